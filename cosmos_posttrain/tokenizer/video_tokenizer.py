"""The tokenizer as the rest of the project sees it.

Flows in: clips (B, 3, T, H, W) float in [-1, 1]. Flows out: indices (B, t, h, w) int32, and back.
Inputs are checked here, whatever runs underneath: the native network or TorchScript.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.geometry import ClipGeometry, Compression

# Resampling and dtypes may overshoot by a rounding: the bfloat16 after 1 is 1.0078.
_RANGE_TOLERANCE = 1e-2


def _check_tensor(value: object, what: str) -> None:
    if not isinstance(value, Tensor):
        raise TokenizerError(
            f"the {what} is a {type(value).__name__}; the tokenizer takes a torch.Tensor: "
            "torch.as_tensor makes one."
        )


class EncoderBackend(Protocol):
    """Something that encodes; checks nothing."""

    compression: Compression
    levels: tuple[int, ...]
    dtype: torch.dtype
    sha256: str

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> indices (B, t, h, w) int32."""
        ...


class DecoderBackend(Protocol):
    """Something that decodes; checks nothing."""

    compression: Compression
    levels: tuple[int, ...]
    dtype: torch.dtype

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, t, h, w) -> (B, 3, T, H, W)."""
        ...


class VideoTokenizer:
    """A discrete video tokenizer.

    Attributes:
        id: what the manifest records: the path or name as it was given.
        compression: frames, rows and columns of pixels per token.
        levels: FSQ levels.
        vocab_size: their product.
        sha256: of the encoder's learned tensors; equal for equal weights in any file form.
        dtype: that the network computes in.
        device: where it runs.
    """

    def __init__(
        self, encoder: EncoderBackend, decoder: DecoderBackend, id: str, device: torch.device
    ) -> None:
        """Joins two halves.

        Raises:
            TokenizerError: if their compression or levels differ.
        """
        for what, a, b in (
            ("compression", encoder.compression.name, decoder.compression.name),
            ("levels", encoder.levels, decoder.levels),
        ):
            if a != b:
                raise TokenizerError(
                    f"the encoder's {what} is {a} and the decoder's {b}; "
                    "give the encoder and decoder of one tokenizer."
                )
        self._encoder, self._decoder = encoder, decoder
        self.id = id
        self.device = device
        self.compression = encoder.compression
        self.levels = encoder.levels
        self.vocab_size = math.prod(self.levels)
        self.sha256 = encoder.sha256
        self.dtype = encoder.dtype

    @property
    def is_native(self) -> bool:
        """Whether both halves run in the native network, in chunks, and can be compiled."""
        return all(hasattr(half, "compile") for half in (self._encoder, self._decoder))

    def compile(self) -> None:
        """Runs encoder and decoder through ``torch.compile`` from now on.

        The first clip of each size takes a minute or two. The second other size compiles once more,
        for all sizes; so does the second chunk of a clip that runs in chunks. Tokens are equal but
        where a latent lies within a rounding error of a border between two codes. It pays on a GPU
        for many clips of one size; on the CPU it gained nothing (measured: 1.03x).

        Raises:
            TokenizerError: if the tokenizer is not native, or PyTorch cannot compile here.
        """
        if not self.is_native:
            raise TokenizerError(
                f"{self.id} runs as TorchScript and cannot be compiled; load it with native=True."
            )
        for half in {id(half): half for half in (self._encoder, self._decoder)}.values():
            half.compile()  # type: ignore[union-attr]

    @torch.inference_mode()
    def encode(self, video: Tensor) -> Tensor:
        """Video -> tokens. An image is a clip of one frame.

        Args:
            video: (B, 3, T, H, W) float in [-1, 1], T = 1 + k * compression.time.

        Returns:
            (B, t, h, w) int32 on the tokenizer's device, each in [0, vocab_size).

        Raises:
            TokenizerError: if the video is not float, not of that shape, or not in [-1, 1].
            GeometryError: if its size cannot be represented.
        """
        _check_tensor(video, "video")
        if not video.is_floating_point():
            raise TokenizerError(
                f"the video is {str(video.dtype).removeprefix('torch.')}; the tokenizer takes "
                "floats in [-1, 1]: divide 8-bit pixels by 127.5 and subtract 1."
            )
        if video.ndim != 5 or video.shape[1] != 3:
            raise TokenizerError(
                f"the video has shape {tuple(video.shape)}; the tokenizer takes (B, 3, T, H, W)."
            )
        ClipGeometry(video.shape[2], video.shape[3], video.shape[4], self.compression)
        if video.shape[0] == 0:
            raise TokenizerError("the batch is empty; the tokenizer needs at least one clip.")
        low, high = (float(value) for value in video.aminmax())
        if math.isnan(low):
            raise TokenizerError(
                "the video holds values that are not a number (NaN); they must be in [-1, 1]: "
                "look for a division by zero or an overflow where it was made."
            )
        if low < -1 - _RANGE_TOLERANCE or high > 1 + _RANGE_TOLERANCE:
            raise TokenizerError(
                f"the video's values lie in [{low:.4g}, {high:.4g}]; they must be in [-1, 1]: "
                "divide 8-bit pixels by 127.5 and subtract 1."
            )
        return self._encoder.encode(video.to(self.device, self._encoder.dtype))

    @torch.inference_mode()
    def decode(self, indices: Tensor) -> Tensor:
        """Tokens -> video.

        Args:
            indices: (B, t, h, w) integers in [0, vocab_size).

        Returns:
            (B, 3, T, H, W) float in [-1, 1], T = 1 + (t - 1) * compression.time.

        Raises:
            TokenizerError: if the indices are not integers of that shape and range.
        """
        video = self._decoder.decode(self._checked(indices))
        return video.clamp_(-1, 1)

    @torch.inference_mode()
    def decode_parts(self, indices: Tensor) -> Iterator[Tensor]:
        """Tokens -> video, part by part: a long clip is never held whole.

        The parts are those of one causal clip, equal to ``decode`` up to rounding. TorchScript
        knows no parts and gives the whole clip as one.

        Args:
            indices: as ``decode`` takes them.

        Yields:
            (B, 3, n, H, W) float in [-1, 1], together the frames of ``decode``.

        Raises:
            TokenizerError: as ``decode``.
        """
        checked = self._checked(indices)
        in_parts = getattr(self._decoder, "decode_parts", None)
        parts = (self._decoder.decode(checked),) if in_parts is None else in_parts(checked)
        for part in parts:
            yield part.clamp_(-1, 1)

    def _checked(self, indices: Tensor) -> Tensor:
        """(B, t, h, w) int32 on the tokenizer's device."""
        _check_tensor(indices, "token grid")
        if indices.is_floating_point() or indices.dtype == torch.bool or indices.ndim != 4:
            raise TokenizerError(
                f"the indices are {str(indices.dtype).removeprefix('torch.')} of shape "
                f"{tuple(indices.shape)}; the decoder takes integers (B, t, h, w)."
            )
        if indices.numel() == 0:
            raise TokenizerError("the token grid is empty; the decoder needs at least one token.")
        indices = indices.long()
        low, high = (int(value) for value in indices.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise TokenizerError(
                f"the indices lie in [{low}, {high}]; this tokenizer's are in "
                f"[0, {self.vocab_size - 1}]."
            )
        return indices.to(self.device, torch.int32)
