"""One clip to generate, and what came of it.

Flows in: an image, a video, frames or tokens, for a Video2World model a text, and the settings of
the sampling: a ``Request``.
Flows out of a ``Session``: a ``GeneratedClip``, its tokens, its frames where they are asked for,
and a record of how it was made.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain.errors import ConfigError, GeometryError, TextError
from cosmos_posttrain.geometry import (
    ClipGeometry,
    Compression,
    num_latent_frames,
    num_pixel_frames,
)
from cosmos_posttrain.inference.head_drafts import HeadRecord
from cosmos_posttrain.inference.sampling import check_guidance, check_sampling
from cosmos_posttrain.text.prompts import prompt_problem
from cosmos_posttrain.video import is_image

DEFAULT_INPUT_FRAMES = 9
IMAGE_FPS = 25.0


@dataclass(frozen=True, eq=False)
class Request:
    """One clip to generate: what is given of it, and how the rest is drawn.

    One of ``path``, ``frames`` and ``tokens`` is given.

    Attributes:
        path: an image or a video of any size; its first frames are given.
        frames: (3, T, H, W) uint8, the given frames in the size of the session's clips.
        tokens: (T, H, W) integers, the given latent frames on the session's grid.
        prompt: what is to be seen, for a Video2World model.
        context: (L, context_dim) floats, what the model attends to in place of a prompt; with fewer
            rows than its texts have it is padded with zero rows, and no rows are the null context.
        negative_prompt: what guidance leads away from; None is the null context.
        guidance_scale: how much the text counts, see ``generate``; 1.0 is the model as it is.
        num_input_frames: how many frames of ``path`` are given; None means 9, and 1 of an image.
        temperature: 0 takes the most likely token each time, 1.0 is the model's own distribution.
        top_p: draws among the most likely tokens before which at most this mass lies.
        top_k: draws among this many most likely tokens.
        seed: the same seed gives the same tokens; of a clip of a list, with the next two.
        item: number of the clip in its list, 0 alone.
        sample: number of the sample among those of its item.
        num_rollout_chunks: how many lengths of the session's clips, one continuing the other.
        rollout_overlap: latent frames at the end of what is there that each further chunk is given;
            None means as many as the first was given, the anchor counted in.
        rollout_anchor: whether each further chunk is given the clip's first latent frame, too.
        with_log_probs: whether the clip says how probable its tokens were.
        fps: frames a second of the clip; None means the input's, and 25 where it has none.

    Raises:
        ConfigError: no input or several, a prompt and a context, or settings out of range.
        TextError: a prompt is empty.
    """

    path: str | Path | None = None
    frames: Tensor | None = None
    tokens: Tensor | None = None
    prompt: str | None = None
    context: Tensor | None = None
    negative_prompt: str | None = None
    guidance_scale: float = 1.0
    num_input_frames: int | None = None
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    item: int = 0
    sample: int = 0
    num_rollout_chunks: int = 1
    rollout_overlap: int | None = None
    rollout_anchor: bool = True
    with_log_probs: bool = False
    fps: float | None = None

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.path, self.frames, self.tokens)) != 1:
            raise ConfigError("a request has one input: give path, frames or tokens.")
        if self.path is None and self.num_input_frames is not None:
            raise ConfigError(
                f"num_input_frames {self.num_input_frames} is for a path; frames and tokens are "
                "given as many as they are."
            )
        if self.prompt is not None and self.context is not None:
            raise ConfigError("a request has one text: give prompt or context.")
        for name, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if text is not None and (problem := prompt_problem(text)):
                raise TextError(f"{name} {problem}.")
        for name in ("seed", "item", "sample"):
            if not 0 <= (number := getattr(self, name)) < 2**63:
                raise ConfigError(f"{name} {number} must lie in [0, 2**63).")
        check_sampling(self.temperature, self.top_p, self.top_k)
        check_guidance(self.guidance_scale, self.negative_prompt is not None)

    @property
    def has_text(self) -> bool:
        """Whether it says what is to be seen."""
        return self.prompt is not None or self.context is not None

    @property
    def prompts(self) -> list[str]:
        """The texts that must be encoded for it."""
        return [text for text in (self.prompt, self.negative_prompt) if text is not None]

    def num_given(self, geometry: ClipGeometry) -> int:
        """Frames of the clip that are given.

        Raises:
            GeometryError: frames or tokens of another size than the session's clips, frames that
                do not fill whole latent frames, or nothing left to generate.
        """
        if self.frames is not None:
            size = (3, None, geometry.height, geometry.width)
            _check_tensor(self.frames, "frames", size, (torch.uint8,))
            count = self.frames.shape[1]
        elif self.tokens is not None:
            grid = (None, *geometry.latent_shape[1:])
            _check_tensor(self.tokens, "tokens", grid, (torch.int64, torch.int32))
            count = num_pixel_frames(self.tokens.shape[0], geometry.compression)
        elif self.num_input_frames is not None:
            count = self.num_input_frames
        else:
            assert self.path is not None
            count = 1 if is_image(self.path) else DEFAULT_INPUT_FRAMES
        geometry.num_condition_tokens(count)
        return count

    def num_overlapping(self, geometry: ClipGeometry) -> int:
        """Latent frames at the end of what is there that each further chunk is given.

        Raises:
            GeometryError: they leave nothing to generate.
        """
        most, count = geometry.latent_shape.time - 1 - self.rollout_anchor, self.rollout_overlap
        if count is None:
            given = num_latent_frames(self.num_given(geometry), geometry.compression)
            count = max(given - self.rollout_anchor, 1)
        if not 1 <= count <= most:
            fix = f"use 1 to {most}" if most else "leave out the anchor with --no-rollout_anchor"
            raise GeometryError(
                f"rollout_overlap {count}{' beside the anchor' * self.rollout_anchor} leaves "
                f"nothing to generate in a clip of {geometry.latent_shape.time} latent frames; "
                f"{fix}."
            )
        return count

    def num_latents(self, geometry: ClipGeometry) -> int:
        """Latent frames of the whole clip, all chunks together."""
        time, more = geometry.latent_shape.time, self.num_rollout_chunks - 1
        if not more:
            return time
        return time + more * (time - self.rollout_anchor - self.num_overlapping(geometry))

    def settings(self, geometry: ClipGeometry) -> dict[str, Any]:
        """What determines the clip, apart from the session."""
        settings = {
            "input": self._input(),
            "num_input_frames": self.num_given(geometry),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "item": self.item,
            "sample": self.sample,
            "fps": self.fps,
        }
        if self.num_rollout_chunks > 1:
            settings |= {
                "num_rollout_chunks": self.num_rollout_chunks,
                "rollout_overlap": self.num_overlapping(geometry),
                "rollout_anchor": self.rollout_anchor,
            }
        if self.has_text:
            settings |= {
                "prompt": self.prompt,
                "negative_prompt": self.negative_prompt,
                "guidance_scale": self.guidance_scale,
            }
        if self.context is not None:
            settings["context"] = f"context with sha256 {_sha256(self.context.float())}"
        return settings

    def _input(self) -> str:
        if self.path is not None:
            return str(Path(self.path).resolve())
        name, tensor = (
            ("frames", self.frames) if self.frames is not None else ("tokens", self.tokens)
        )
        assert tensor is not None
        return f"{name} with sha256 {_sha256(tensor)}"


def _check_tensor(
    tensor: Tensor, name: str, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Refuses another shape, of which None may be any size, and another dtype."""
    fits = tensor.ndim == len(shape) and all(
        size > 0 and wanted in (None, size)
        for wanted, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes:
        wanted = ", ".join("T" if size is None else str(size) for size in shape)
        raise GeometryError(
            f"the given {name} are {tuple(tensor.shape)} {tensor.dtype}; this session takes "
            f"({wanted}) {dtypes[0]}."
        )


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Prompt:
    """What is given of a clip, as the model takes it.

    Attributes:
        tokens: (1, P) int64 on the CPU.
        fps: of the input; 0.0 where unknown.
        num_repeated: frames that repeat the last one, because the input was too short.
        context: (1, context_len, context_dim) float32 on the CPU; None for a base model.
        negative_context: likewise; None without a negative prompt.
        text_encoder: id and sha256 of what made them of texts; None where nothing did.
    """

    tokens: Tensor
    fps: float = 0.0
    num_repeated: int = 0
    context: Tensor | None = None
    negative_context: Tensor | None = None
    text_encoder: dict[str, str] | None = None


@dataclass(eq=False)
class GeneratedClip:
    """A generated clip.

    Attributes:
        tokens: (T, H, W) int64 on the CPU, the given ones and those that follow; the same on every
            rank of a tensor-parallel group.
        num_condition_tokens: how many of them were given.
        num_repeated: frames of the input that repeat its last one, because it was too short.
        fps: frames a second.
        settings: what determines the clip.
        tensor_model_parallel_size: processes that shared the model.
        seconds: that each part took so far; of a batch of clips, this one's share.
        decode: makes frames of tokens, part by part: (3, n, H, W) uint8 on the CPU each.
        decoding: how the tokens were found; see ``SessionConfig``.
        text_encoder: id and sha256 of what encoded its texts; None where nothing did.
        log_probs: (T, H, W) float32 on the CPU, how probable each token was among all tokens at
            temperature 1, in nats, guidance included; NaN for given ones. None where not asked for.
        draft_heads: tokens that each Medusa head foretold, and how many of them came; None where
            none was asked.
    """

    tokens: Tensor
    num_condition_tokens: int
    num_repeated: int
    fps: float
    settings: dict[str, Any]
    tensor_model_parallel_size: int
    seconds: dict[str, float]
    decode: Callable[[Tensor], Iterator[Tensor]] = field(repr=False)
    text_encoder: dict[str, str] | None = None
    log_probs: Tensor | None = None
    decoding: str = "sequential"
    draft_heads: HeadRecord | None = None

    @cached_property
    def frames(self) -> Tensor:
        """(3, T, H, W) uint8 on the CPU, decoded when they are first asked for."""
        return torch.cat(list(self._decoded()), dim=1)

    def frame_parts(self) -> Iterator[Tensor]:
        """The frames part by part, so that a long clip is never held whole."""
        if "frames" in self.__dict__:
            return iter([self.frames])
        return self._decoded()

    def _decoded(self) -> Iterator[Tensor]:
        self.seconds["decode"] = 0.0
        parts = self.decode(self.tokens)
        while True:
            start = time.perf_counter()
            part = next(parts, None)
            self.seconds["decode"] += time.perf_counter() - start
            if part is None:
                return
            yield part

    def num_frames(self, compression: Compression) -> int:
        """Frames that it decodes to."""
        return num_pixel_frames(self.tokens.shape[0], compression)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens that were not given."""
        return self.tokens.numel() - self.num_condition_tokens

    @property
    def record(self) -> dict[str, Any]:
        """How the clip was made, for a json beside it."""
        text = {} if self.text_encoder is None else {"text_encoder": self.text_encoder}
        heads = {} if self.draft_heads is None else {"medusa_heads": self.draft_heads.to_json()}
        return {
            "settings": self.settings,
            **text,
            "num_condition_tokens": self.num_condition_tokens,
            "num_generated_tokens": self.num_generated_tokens,
            # The video encoder may round differently from run to run; the tokens do not.
            "tokens_sha256": _sha256(self.tokens),
            "num_repeated": self.num_repeated,
            "fps": self.fps,
            "decoding": self.decoding,
            **heads,
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "tokens_per_second": round(self.num_generated_tokens / self.seconds["generate"], 2),
        }
