"""The arithmetic between pixels and tokens. Pure Python, no dependencies.

Flows in: a compression factor (T, H, W) and a clip's size in frames and pixels. Flows out: the
latent shape (T, H, W), the sequence length, or a sentence that names the nearest sizes that work.

A causal tokenizer turns ``1 + k * compression.time`` frames into ``1 + k`` latent frames: the first
latent frame stands for the first frame alone (Cosmos World Foundation Model Platform, section 5.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cosmos_posttrain.errors import GeometryError


class LatentShape(NamedTuple):
    """A token grid: latent frames, rows, columns."""

    time: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one clip, ``T * H * W``."""
        return self.time * self.height * self.width

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame, ``H * W``."""
        return self.height * self.width


class Compression(NamedTuple):
    """How many frames, rows and columns of pixels one token stands for."""

    time: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """The field's short name, such as ``4x8x8``."""
        return f"{self.time}x{self.height}x{self.width}"

    def __str__(self) -> str:
        return f"{self.time},{self.height},{self.width}"


def _parse_triple(value: str | Sequence[int], what: str, example: str) -> tuple[int, int, int]:
    parts: Sequence[object]
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip("()[] ").replace("x", ",").split(",")]
    else:
        parts = value if isinstance(value, Sequence) else [value]
    try:
        numbers = tuple(int(str(part)) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) != 3 or min(numbers) < 1:
        raise GeometryError(
            f"{what} {value!r} is not three positive whole numbers T,H,W; write it like {example}."
        )
    return numbers[0], numbers[1], numbers[2]


def parse_compression(value: str | Sequence[int]) -> Compression:
    """Reads ``"4,8,8"``, ``"4x8x8"`` or a sequence of three numbers.

    Raises:
        GeometryError: if it is not three positive whole numbers.
    """
    return Compression(*_parse_triple(value, "the compression factor", "4,8,8"))


def parse_latent_shape(value: str | Sequence[int]) -> LatentShape:
    """Reads ``"5,40,64"`` or a sequence of three numbers.

    Raises:
        GeometryError: if it is not three positive whole numbers.
    """
    return LatentShape(*_parse_triple(value, "the latent shape", "5,40,64"))


def _nearest(value: int, step: int, offset: int = 0) -> str:
    """The multiples of ``step`` (plus ``offset``) on both sides of ``value``, in words."""
    below = (value - offset) // step * step + offset
    choices = [size for size in (below, below + step) if size >= max(offset, 1)]
    return " or ".join(str(size) for size in choices)


def num_latent_frames(num_frames: int, compression: Compression, what: str = "frames") -> int:
    """Latent frames of a clip: ``1 + (num_frames - 1) / compression.time``.

    Raises:
        GeometryError: if ``num_frames`` is not ``1 + k * compression.time``; names the nearest.
    """
    if num_frames < 1 or (num_frames - 1) % compression.time:
        raise GeometryError(
            f"{num_frames} {what} cannot be encoded at {compression.name}: the number must be "
            f"1 + a multiple of {compression.time}; "
            f"use {_nearest(num_frames, compression.time, 1)}."
        )
    return 1 + (num_frames - 1) // compression.time


def num_pixel_frames(num_latents: int, compression: Compression) -> int:
    """Frames that ``num_latents`` latent frames decode to: ``1 + (num_latents - 1) * ct``."""
    return 1 + (num_latents - 1) * compression.time


@dataclass(frozen=True)
class ClipGeometry:
    """Size of a clip before and after the tokenizer; refuses what cannot be represented.

    Attributes:
        num_frames: frames of the whole clip, ``1 + k * compression.time``.
        height: pixels, a multiple of ``compression.height``.
        width: pixels, a multiple of ``compression.width``.
        compression: the tokenizer's compression factor.

    Raises:
        GeometryError: one sentence that names every size that does not fit and the nearest ones.
    """

    num_frames: int
    height: int
    width: int
    compression: Compression

    def __post_init__(self) -> None:
        problems = []
        try:
            num_latent_frames(self.num_frames, self.compression)
        except GeometryError as error:
            problems.append(str(error).rstrip("."))
        for name, size, step in (
            ("height", self.height, self.compression.height),
            ("width", self.width, self.compression.width),
        ):
            if size < 1 or size % step:
                problems.append(
                    f"{name} {size} cannot be encoded at {self.compression.name}: it must be a "
                    f"positive multiple of {step}; use {_nearest(size, step, 0) or step}"
                )
        if problems:
            raise GeometryError("; also, ".join(problems) + ".")

    @property
    def latent_shape(self) -> LatentShape:
        """The token grid (T, H, W)."""
        return LatentShape(
            num_latent_frames(self.num_frames, self.compression),
            self.height // self.compression.height,
            self.width // self.compression.width,
        )

    @property
    def seq_length(self) -> int:
        """Tokens of one clip."""
        return self.latent_shape.num_tokens

    def num_condition_tokens(self, num_input_frames: int) -> int:
        """Tokens of the first ``num_input_frames`` frames.

        Raises:
            GeometryError: if the frames do not fill whole latent frames, or leave nothing to
                generate.
        """
        latents = num_latent_frames(num_input_frames, self.compression, "input frames")
        if latents >= self.latent_shape.time:
            raise GeometryError(
                f"{num_input_frames} input frames leave nothing to generate in a clip of "
                f"{self.num_frames} frames; use at most "
                f"{num_pixel_frames(self.latent_shape.time - 1, self.compression)}."
            )
        return latents * self.latent_shape.tokens_per_frame
