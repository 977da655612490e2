"""A model, its tokenizer, text encoder and contract: opened and checked once, then asked for clips.

Flows in: a ``SessionConfig``, then ``Request``s. Flows out: ``GeneratedClip``s. Nothing is written.

    image or video --read_input--> frames (3, T_in, H, W) uint8
        --encode--> prompt (1, P): a causal tokenizer's tokens of the first frames are those that
                    the whole clip would begin with
    prompt --TextConditioner--> context (1, L, context_dim), for a Video2World model
        --generate--> tokens (T, h, w) --decode, where frames are asked for--> (3, T, H, W) uint8

The session is the only owner of the model, the tokenizer and the text encoder: what it lets go of
is freed. All ranks that share a model call the same methods; the first of them reads and encodes,
and is the one to decode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
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
from cosmos_posttrain.inference.conditioning import TextConditioner
from cosmos_posttrain.inference.config import SESSION_FLAGS, SessionConfig
from cosmos_posttrain.inference.decode_plan import lay_out
from cosmos_posttrain.inference.engine import chosen_decoding
from cosmos_posttrain.inference.head_drafts import HeadCounts
from cosmos_posttrain.inference.memory import Peaks
from cosmos_posttrain.inference.quantization import check_quantization, quantize
from cosmos_posttrain.inference.request import IMAGE_FPS, GeneratedClip, Prompt, Request
from cosmos_posttrain.inference.rollout import roll_out
from cosmos_posttrain.inference.stacking import check_alike, continue_prompts
from cosmos_posttrain.inference.watching import OnTokens
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
        peaks: memory of each stage so far.

    Raises:
        UserError: one of its children, for anything that does not fit together.
    """

    def __init__(self, config: SessionConfig) -> None:
        self.peaks = Peaks()
        check(config, flag_names(SESSION_FLAGS))
        check_quantization(config.quantization, config.decoding)
        self._config = config
        source = opening.open_checkpoint(config)
        self.contract = contract = source.contract
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
        self._conditioner: TextConditioner | None = None
        if source.config.is_video2world:
            choice = opening.choose_text_encoder(config, source)
            self._conditioner = TextConditioner(choice, config.offload_text_encoder_model)
        self.notes = opening.notes(source, self.geometry)
        self._choice = dataclasses.replace(self._choice, sha256=tokenizer.sha256)
        self._tokenizer: VideoTokenizer | None = tokenizer
        self._model: ARModel | None = None

    @property
    def name(self) -> str:
        """What the model is called in messages."""
        return str(self._source.path or self._config.ar_model_dir)

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
            UserError: see ``check``.
        """
        self.check(request)
        path, config, clip = self._source.path, self._config, self.geometry
        text = {}
        if self._conditioner is not None and request.prompts:
            text["text_encoder"] = self._conditioner.choice.settings()
        return {
            **request.settings(clip),
            **text,
            "checkpoint": str(path.resolve()) if path else config.ar_model_dir,
            "tokenizer": to_plain(self.tokenizer_info),
            "clip": {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width},
            "latent_shape": list(clip.latent_shape),
            "rope_scaling": config.rope_scaling,
            "rope_scale": config.rope_scale,
            **({} if config.quantization is None else {"quantization": config.quantization}),
        }

    def check(self, request: Request) -> None:
        """Refuses a request that does not fit.

        Raises:
            GeometryError: frames, tokens or a context of another size than the session's.
            ConfigError: a text for a base model, or none for a Video2World model.
        """
        request.num_given(self.geometry)
        request.num_latents(self.geometry)
        contracts.check_text(request, self.model_config, self.name)

    def encode_prompts(
        self,
        prompts: Sequence[str],
        others: Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Encodes prompts before they are asked for; all ranks of the job together.

        With ``offload_text_encoder_model`` the encoder is gone afterwards, so that it never lies
        beside the model, if the model is not loaded yet.

        Args:
            prompts: of the requests that these ranks will generate.
            others: those of other ranks' requests; a prompt that is cut is told once for all.
            progress: called with the number of prompts encoded so far, after each.

        Raises:
            TextError: the text encoder is missing, damaged or not the model's.
        """
        conditioner = self._conditioner
        if conditioner is None or not prompts:
            return
        if self._model is None:
            groups.initialize(groups.Parallelism(tensor=self.tensor_model_parallel_size))
        with self.peaks.stage("text"):
            groups.decide(
                lambda: conditioner.encode(prompts, others, progress),
                parallel_state.get_tensor_model_parallel_src_rank(),
                parallel_state.get_tensor_model_parallel_group(),
            )

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
        is_rounded = self._config.quantization is not None
        self._model = load_source(
            self._source,
            self._config.dtype,
            self.tensor_model_parallel_size,
            self._config.layer_spec,
            device="cpu" if is_rounded else None,
        )
        if is_rounded:
            quantize(self._model, launch.device())
        lay_out(self._model)
        if self._config.offload_ar_model:
            self._move_model("cpu")

    def generate(
        self,
        request: Request,
        progress: Callable[[int], None] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> GeneratedClip:
        """Generates one clip; see ``generate_many``."""
        return self.generate_many([request], progress, on_tokens)[0]

    def generate_many(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], None] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[GeneratedClip]:
        """Generates clips in one batch; all ranks that share the model together.

        A clip is what it would be alone, up to rounding.

        Args:
            requests: what is given of each clip, as many frames, and how it is sampled: the same
                temperature, top_p, top_k and guidance_scale.
            progress: called with the number of tokens of a clip so far, as they come.
            on_tokens: called with the number of a request and its clip's tokens so far, given ones
                included, (n,) int64 on the CPU: once a latent frame, on every rank.

        Raises:
            ConfigError: requests that cannot be one batch.
            VideoError: the input cannot be decoded; on all of those ranks.
            TextError: the text encoder is missing, damaged or not the model's.
            UserError: see ``check``.
            CosmosPosttrainError: the model's logits are not finite.
        """
        check_alike(requests, self.geometry)
        if requests[0].num_rollout_chunks == 1:
            return self._generate_chunk(requests, progress, on_tokens)
        chunk = self._generate_chunk
        clips = roll_out(chunk, requests, self.geometry, progress, on_tokens)
        return [
            dataclasses.replace(clip, settings=self.settings_of(request))
            for clip, request in zip(clips, requests, strict=True)
        ]

    def _generate_chunk(
        self,
        requests: Sequence[Request],
        progress: Callable[[int], None] | None,
        on_tokens: OnTokens | None,
    ) -> list[GeneratedClip]:
        """Generates clips of the session's length."""
        settings = [self.settings_of(request) for request in requests]
        start = time.perf_counter()
        self.encode_prompts([text for request in requests for text in request.prompts])
        text_seconds = time.perf_counter() - start
        self.load()
        start = time.perf_counter()
        prompts = [self._prompt(request) for request in requests]
        encoded = time.perf_counter()
        with self.peaks.stage("generate"):
            counts = HeadCounts()
            tokens, log_probs = self._continue(prompts, requests, progress, on_tokens, counts)
        seconds = {
            "encode": (text_seconds + encoded - start) / len(requests),
            "generate": (time.perf_counter() - encoded) / len(requests),
        }
        shape = self.geometry.latent_shape
        return [
            GeneratedClip(
                tokens=tokens[number].view(*shape),
                num_condition_tokens=prompt.tokens.shape[1],
                num_repeated=prompt.num_repeated,
                fps=request.fps or (prompt.fps if 0 < prompt.fps < 1000 else IMAGE_FPS),
                settings=settings[number],
                tensor_model_parallel_size=self.tensor_model_parallel_size,
                seconds=dict(seconds),
                decode=self.decode_parts,
                text_encoder=prompt.text_encoder,
                log_probs=None if log_probs is None else log_probs[number].view(*shape),
                decoding=chosen_decoding(self._config.decoding),
                draft_heads=counts.of_clip(number),
            )
            for number, (prompt, request) in enumerate(zip(prompts, requests, strict=True))
        ]

    def encode(self, frames: Tensor) -> Tensor:
        """Frames (3, T, H, W) uint8 -> tokens (t, h, w) int64 on the CPU."""
        with self.peaks.stage("encode"):
            indices = self._get_tokenizer().encode(to_float(frames)[None])
            return indices[0].long().cpu()

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (t, h, w) -> frames (3, T, H, W) uint8 on the CPU."""
        return torch.cat(list(self.decode_parts(tokens)), dim=1)

    def decode_parts(self, tokens: Tensor) -> Iterator[Tensor]:
        """The frames of ``decode`` part by part: of a long clip a part at a time is held."""
        parts = self._get_tokenizer().decode_parts(tokens[None])
        while True:
            with self.peaks.stage("decode"):
                part = next(parts, None)
                if part is None:
                    return
                pixels = to_uint8(part[0]).cpu()
            yield pixels

    def _prompt(self, request: Request) -> Prompt:
        """The request's prompt on every rank, or the same error on every rank."""
        return groups.decide(
            lambda: self._with_text(self._read(request), request),
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

    def _with_text(self, prompt: Prompt, request: Request) -> Prompt:
        conditioner = self._conditioner
        if conditioner is None:
            return prompt
        if request.context is not None:
            context = conditioner.padded(request.context)
        else:
            context = conditioner.context(request.prompt)
        negative = request.negative_prompt
        return dataclasses.replace(
            prompt,
            context=context,
            negative_context=None if negative is None else conditioner.context(negative),
            text_encoder=conditioner.identity if request.prompts else None,
        )

    def _continue(
        self,
        prompts: Sequence[Prompt],
        requests: Sequence[Request],
        progress: Callable[[int], None] | None,
        on_tokens: OnTokens | None,
        head_counts: HeadCounts,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``continue_prompts``."""
        if self._config.offload_tokenizer:
            self._free_tokenizer()
        with self._working_model() as model:
            return continue_prompts(
                model,
                self.geometry,
                prompts,
                requests,
                decoding=chosen_decoding(self._config.decoding),
                window=self._config.decoding_window,
                cuda_graphs=self._config.cuda_graphs,
                progress=progress,
                on_tokens=on_tokens,
                head_counts=head_counts,
            )

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
