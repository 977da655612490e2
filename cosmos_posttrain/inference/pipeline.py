"""Input frames to an mp4 of the whole clip.

Flows in: a ``Plan``. Flows out: for each input an mp4 and a json.

    image or video --read_input--> frames (3, T_in, H, W) uint8
        --tokenizer--> prompt (1, P): a causal tokenizer's tokens of the first frames are those
                       that the whole clip would begin with
        --generate--> tokens (1, T * h * w) --tokenizer--> (3, T, H, W) uint8 --write_mp4--> mp4

The first rank of each tensor-parallel group reads, encodes, decodes and writes; the others only
generate. Data-parallel groups share out the inputs.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.checkpoint.load import load_source
from cosmos_posttrain.errors import CosmosPosttrainError, PartialFailureError, VideoError
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.inference.outputs import Item, write_record
from cosmos_posttrain.inference.plan import Plan, make_plan
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.tokenizer.loading import load_tokenizer_pair
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer
from cosmos_posttrain.video import read_image, read_input, to_float, to_uint8, write_mp4

_IMAGE_FPS = 25.0


def _free_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Prompt:
    """The given frames as tokens.

    Attributes:
        tokens: (1, P) int64 on the CPU.
        fps: of the input; 0.0 where unknown.
        num_repeated: frames that repeat the last one, because the input was too short.
    """

    tokens: Tensor
    fps: float
    num_repeated: int


class Pipeline:
    """A model and a tokenizer that turn items into files."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._config = plan.config
        self._model: ARModel = load_source(
            plan.source,
            self._config.dtype,
            plan.tensor_model_parallel_size,
            self._config.layer_spec,
        )
        self._writes = parallel_state.get_tensor_model_parallel_rank() == 0
        self._tokenizer: VideoTokenizer | None = plan.tokenizer if self._writes else None

    def _get_tokenizer(self) -> VideoTokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer_pair(
                *self._plan.tokenizer_paths, self._plan.geometry.compression, launch.device()
            )
        return self._tokenizer

    def _encode(self, item: Item) -> Prompt:
        geometry, num_frames = self._plan.geometry, self._plan.num_input_frames
        if self._config.input_type == "image":
            frames, fps, num_repeated = (
                read_image(item.input, geometry.height, geometry.width),
                0.0,
                0,
            )
        else:
            clip = read_input(item.input, num_frames, geometry.height, geometry.width)
            frames, fps, num_repeated = clip.frames, clip.fps, clip.num_repeated
        indices = self._get_tokenizer().encode(to_float(frames)[None])
        return Prompt(indices.flatten(1).long().cpu(), fps, num_repeated)

    def _prompt(self, item: Item) -> Prompt:
        """The item's prompt on every rank, or the same error on every rank."""
        shared: list[Any] = [None]
        if self._writes:
            try:
                shared = [self._encode(item)]
            except CosmosPosttrainError as error:
                shared = [error]
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            torch.distributed.broadcast_object_list(
                shared,
                parallel_state.get_tensor_model_parallel_src_rank(),
                group=parallel_state.get_tensor_model_parallel_group(),
            )
        if isinstance(shared[0], CosmosPosttrainError):
            raise shared[0]
        prompt: Prompt = shared[0]
        return prompt

    def _generate(self, prompt: Tensor, label: str) -> Tensor:
        """(1, P) -> (1, T * H * W), the prompt and what follows it."""
        config = self._config
        if config.offload_tokenizer:
            self._tokenizer = None
            _free_gpu()
        if config.offload_ar_model:
            self._model.module.to(launch.device())
        num_tokens = self._plan.geometry.seq_length - prompt.shape[1]
        generated = generate(
            self._model,
            prompt,
            num_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed,
            progress=ProgressDisplay(num_tokens, "tokens", label).show,
        )
        if config.offload_ar_model:
            self._model.module.to("cpu")
            _free_gpu()
        return torch.cat([prompt, generated.cpu()], dim=1)

    def run_item(self, item: Item) -> None:
        """Generates one clip and writes it.

        Raises:
            VideoError: the input cannot be decoded.
        """
        start = time.perf_counter()
        prompt = self._prompt(item)
        if prompt.num_repeated:
            launch.say(
                f"note: {item.input} is shorter than {self._plan.num_input_frames} frames; its "
                f"last frame was repeated {prompt.num_repeated} times.",
                error=True,
            )
        encoded = time.perf_counter()
        tokens = self._generate(prompt.tokens, item.video.name)
        generated = time.perf_counter()
        if not self._writes:
            return
        indices = tokens.view(1, *self._plan.geometry.latent_shape)
        frames = to_uint8(self._get_tokenizer().decode(indices)[0])
        seconds = {
            "encode": encoded - start,
            "generate": generated - encoded,
            "decode": time.perf_counter() - generated,
        }
        self._write(item, tokens, frames, prompt, seconds)

    def _write(
        self, item: Item, tokens: Tensor, frames: Tensor, prompt: Prompt, seconds: dict[str, float]
    ) -> None:
        fps = self._config.fps or (prompt.fps if 0 < prompt.fps < 1000 else _IMAGE_FPS)
        num_given = prompt.tokens.shape[1]
        num_generated = self._plan.geometry.seq_length - num_given
        record = {
            "settings": self._plan.settings_of(item),
            "num_condition_tokens": num_given,
            "num_generated_tokens": num_generated,
            # The video encoder may round differently from run to run; the tokens do not.
            "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
            "num_repeated": prompt.num_repeated,
            "fps": fps,
            "tensor_model_parallel_size": self._plan.tensor_model_parallel_size,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "tokens_per_second": round(num_generated / seconds["generate"], 2),
        }
        write_record(item, record)
        write_mp4(item.video, frames, fps)
        clip = self._plan.geometry
        print(
            f"wrote {item.video}: {clip.num_frames} frames of {clip.width}x{clip.height} at "
            f"{fps:g} fps, the first {self._plan.num_input_frames} given; {num_generated} tokens "
            f"in {seconds['generate']:.1f} s",
            flush=True,
        )


def _run_items(pipeline: Pipeline, plan: Plan) -> list[str]:
    """This process's share of the items; returns what could not be read in a batch."""
    failures = []
    size = parallel_state.get_data_parallel_world_size()
    for item in plan.items[parallel_state.get_data_parallel_rank() :: size]:
        try:
            pipeline.run_item(item)
        except VideoError as error:
            if plan.config.batch_input_path is None:
                raise
            failures.append(str(error))
    if size == 1:
        return failures
    shared: list[list[str]] = [[] for _ in range(size)]
    torch.distributed.all_gather_object(
        shared, failures, group=parallel_state.get_data_parallel_group()
    )
    return [failure for part in shared for failure in part]


def run(config: InferConfig) -> None:
    """Carries out one run of ``infer.py``.

    Raises:
        UserError: bad usage or bad input; nothing was written.
        PartialFailureError: some inputs of a batch could not be read; the others are done.
    """
    quiet_megatron_logging()
    plan = make_plan(config)
    for note in plan.notes:
        launch.say(f"note: {note}.", error=True)
    if plan.num_complete:
        launch.say(
            f"note: {plan.num_complete} output(s) are complete already; skipped.", error=True
        )
    if not plan.items:
        return
    failures = _run_items(Pipeline(plan), plan)
    if failures:
        raise PartialFailureError(
            f"{len(failures)} of {len(plan.items)} inputs could not be read, the others are "
            "done: " + " ".join(failures)
        )
