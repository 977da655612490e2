"""A model, its tokenizer and their contract: opened and checked once, then asked for clips.

Flows in: a ``SessionConfig``, then ``Request``s. Flows out: ``GeneratedClip``s. Nothing is written.

    image or video --read_input--> frames (3, T_in, H, W) uint8
        --encode--> prompt (1, P): a causal tokenizer's tokens of the first frames are those that
                    the whole clip would begin with
        --generate--> tokens (T, h, w) --decode, where frames are asked for--> (3, T, H, W) uint8

The session is the only owner of the model and of the tokenizer: what it lets go of is freed. All
ranks that share a model call the same methods; the first of them reads and encodes, and is the one
to decode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.load import load_source
from cosmos_posttrain.cli import flag_names
from cosmos_posttrain.config import check
from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.inference import contract as contracts
from cosmos_posttrain.inference import opening
from cosmos_posttrain.inference.config import SESSION_FLAGS, SessionConfig
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.inference.request import IMAGE_FPS, GeneratedClip, Prompt, Request
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer
from cosmos_posttrain.video import read_input, to_float, to_uint8


class Session:
    """One model with its tokenizer, for clips of one size.

    Opening it checks everything that can be checked without the model's weights. Those are loaded
    by ``load``, or by the first ``generate``.

    Args:
        config: what to open.

    Attributes:
        contract: of the data that the model was trained on; None where that is not recorded.
        geometry: of every clip, in pixels and in tokens.
        tokenizer_info: which tokenizer it is.
        tensor_model_parallel_size: processes that share the model.
        notes: sentences for the user.

    Raises:
        UserError: one of its children, for anything that does not fit together.
    """

    def __init__(self, config: SessionConfig) -> None:
        check(config, flag_names(SESSION_FLAGS))
        self._config = config
        source = opening.open_checkpoint(config)
        self.contract = contract = contracts.read_contract(source)
        self.tensor_model_parallel_size = opening.tensor_size(config, source)
        self._choice = opening.choose_tokenizer(config, contract)
        geometry_at = partial(opening.choose_geometry, config, source, contract)
        # Refused before a tokenizer is downloaded, where its compression is known.
        known = self._choice.compression
        geometry = None if known is None else geometry_at(known)
        tokenizer = self._choice.load()
        self.geometry = geometry or geometry_at(tokenizer.compression)
        self.tokenizer_info = TokenizerInfo(
            tokenizer.id,
            tokenizer.sha256,
            tuple(tokenizer.compression),
            tokenizer.levels,
            tokenizer.vocab_size,
        )
        if contract is not None and not config.allow_tokenizer_mismatch:
            contracts.check_tokenizer(contract, self.tokenizer_info)
        self._source = source.at_grid(
            self.geometry.latent_shape,
            config.rope_scaling,
            config.rope_scale,
            tokenizer.vocab_size,
        )
        contracts.check_vocabulary(self._source.config.vocab_size, self.tokenizer_info)
        self.notes = opening.notes(source, self.geometry)
        self._choice = dataclasses.replace(self._choice, sha256=tokenizer.sha256)
        self._tokenizer: VideoTokenizer | None = tokenizer
        self._model: ARModel | None = None

    @property
    def model_config(self) -> ModelConfig:
        """The model's numbers, at the session's grid."""
        return self._source.config

    @property
    def is_first(self) -> bool:
        """True on the rank that reads, encodes and decodes for those that share its model."""
        return parallel_state.get_tensor_model_parallel_rank() == 0

    def settings_of(self, request: Request) -> dict[str, Any]:
        """What determines a clip: equal settings give equal tokens.

        Raises:
            GeometryError: the request does not fit the session's clips.
        """
        path, config, clip = self._source.path, self._config, self.geometry
        return {
            **request.settings(clip),
            "checkpoint": str(path.resolve()) if path else config.ar_model_dir,
            "tokenizer": to_plain(self.tokenizer_info),
            "clip": {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width},
            "latent_shape": list(clip.latent_shape),
            "rope_scaling": config.rope_scaling,
            "rope_scale": config.rope_scale,
        }

    def load(self) -> None:
        """Loads the model's weights, once; all ranks of the job together.

        Raises:
            CheckpointError: the weights are damaged or do not fit.
        """
        if self._model is not None:
            return
        groups.initialize(groups.Parallelism(tensor=self.tensor_model_parallel_size))
        if self._config.offload_tokenizer or not self.is_first:
            self._free_tokenizer()
        self._model = load_source(
            self._source,
            self._config.dtype,
            self.tensor_model_parallel_size,
            self._config.layer_spec,
        )
        if self._config.offload_ar_model:
            self._move_model("cpu")

    def generate(
        self, request: Request, progress: Callable[[int], None] | None = None
    ) -> GeneratedClip:
        """Generates one clip; all ranks that share the model together.

        Args:
            request: what is given of the clip.
            progress: called with the number of tokens generated so far, after each.

        Raises:
            VideoError: the input cannot be decoded; on all of those ranks.
            GeometryError: the request does not fit the session's clips.
            CosmosPosttrainError: the model's logits are not finite.
        """
        settings = self.settings_of(request)
        self.load()
        start = time.perf_counter()
        prompt = self._prompt(request)
        encoded = time.perf_counter()
        tokens = self._continue(prompt.tokens, request, progress)
        return GeneratedClip(
            tokens=tokens.view(*self.geometry.latent_shape),
            num_condition_tokens=prompt.tokens.shape[1],
            num_repeated=prompt.num_repeated,
            fps=request.fps or (prompt.fps if 0 < prompt.fps < 1000 else IMAGE_FPS),
            settings=settings,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            seconds={"encode": encoded - start, "generate": time.perf_counter() - encoded},
            decode=self.decode,
        )

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (3, T, H, W) uint8 -> tokens (t, h, w) int64 on the CPU."""
        indices = self._get_tokenizer().encode(to_float(frames)[None])
        return indices[0].long().cpu()

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (t, h, w) -> frames (3, T, H, W) uint8 on the CPU."""
        return to_uint8(self._get_tokenizer().decode(tokens[None])[0]).cpu()

    def _prompt(self, request: Request) -> Prompt:
        """The request's prompt on every rank, or the same error on every rank."""
        return groups.decide(
            lambda: self._read(request),
            parallel_state.get_tensor_model_parallel_src_rank(),
            parallel_state.get_tensor_model_parallel_group(),
        )

    def _read(self, request: Request) -> Prompt:
        if request.tokens is not None:
            return Prompt(request.tokens.long().cpu().flatten()[None])
        if request.frames is not None:
            return Prompt(self.encode(request.frames).flatten()[None])
        assert request.path is not None
        clip = read_input(
            request.path,
            request.num_given(self.geometry),
            self.geometry.height,
            self.geometry.width,
        )
        tokens = self.encode(clip.frames).flatten()[None]
        return Prompt(tokens, clip.fps, clip.num_repeated)

    def _continue(
        self, prompt: Tensor, request: Request, progress: Callable[[int], None] | None
    ) -> Tensor:
        """(1, P) -> (1, T * h * w), the prompt and what follows it, on the CPU."""
        if self._config.offload_tokenizer:
            self._free_tokenizer()
        with self._working_model() as model:
            generated = generate(
                model,
                prompt,
                self.geometry.seq_length - prompt.shape[1],
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                seed=request.seed,
                progress=progress,
            )
            return torch.cat([prompt, generated.cpu()], dim=1)

    # Memory: nothing else holds the tokenizer or the model.

    def _get_tokenizer(self) -> VideoTokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._choice.load()
        return self._tokenizer

    def _free_tokenizer(self) -> None:
        self._tokenizer = None
        _give_back_memory()

    @contextlib.contextmanager
    def _working_model(self) -> Iterator[ARModel]:
        """The model on its device, and back on the CPU afterwards where that was asked for."""
        assert self._model is not None
        if not self._config.offload_ar_model:
            yield self._model
            return
        self._move_model(launch.device())
        try:
            yield self._model
        finally:
            self._move_model("cpu")

    def _move_model(self, device: str | torch.device) -> None:
        assert self._model is not None
        self._model.module.to(device)
        _give_back_memory()


def _give_back_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
