"""Encoding and decoding against the clock.

Flows in: a tokenizer and batches of clips (B, 3, T, H, W) uint8. Flows out: tokens,
reconstructions, and the seconds that each half took.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.tokenizer import VideoTokenizer
from cosmos_posttrain.video import to_float, to_uint8


class TimedCodec:
    """Encodes and decodes batches and takes the time, after a warm-up at each new batch shape."""

    def __init__(self, tokenizer: VideoTokenizer) -> None:
        self._tokenizer = tokenizer
        self._warm: set[tuple[int, ...]] = set()

    def __call__(self, clips: Tensor) -> tuple[Tensor, Tensor, float, float]:
        """(B, 3, T, H, W) uint8 -> tokens, reconstructions (uint8), seconds to encode, to decode.

        Raises:
            ConfigError: the batch does not fit the GPU's memory.
        """
        video = to_float(clips.to(self._tokenizer.device))
        try:
            if clips.shape not in self._warm:
                self._warm_up(video)
                self._warm.add(tuple(clips.shape))
            indices, encode_seconds = self._timed(self._tokenizer.encode, video)
            decoded, decode_seconds = self._timed(self._tokenizer.decode, indices)
        except torch.OutOfMemoryError as error:
            size, _, num_frames, height, width = clips.shape
            raise ConfigError(
                f"{size} clips of {num_frames} frames of {width}x{height} do not fit the memory of "
                f"{self._tokenizer.device}; lower --batch_size, --num_frames or the size."
            ) from error
        return indices.cpu(), to_uint8(decoded).cpu(), encode_seconds, decode_seconds

    def _warm_up(self, video: Tensor) -> None:
        """A GPU wants the very shape; a CPU is warm after few frames, where each is dear."""
        if self._tokenizer.device.type != "cuda":
            video = video[:, :, : 1 + self._tokenizer.compression.time]
        self._tokenizer.decode(self._tokenizer.encode(video))

    def _timed(self, function: Callable[[Tensor], Tensor], given: Tensor) -> tuple[Tensor, float]:
        self._wait()
        start = time.perf_counter()
        result = function(given)
        self._wait()
        return result, time.perf_counter() - start

    def _wait(self) -> None:
        if self._tokenizer.device.type == "cuda":
            torch.cuda.synchronize(self._tokenizer.device)


def speed(num_frames: int, encode_seconds: float, decode_seconds: float) -> dict[str, float]:
    """Seconds and frames a second, as the metrics name them."""
    return {
        "encode_seconds": encode_seconds,
        "decode_seconds": decode_seconds,
        "encode_frames_per_second": num_frames / max(encode_seconds, 1e-9),
        "decode_frames_per_second": num_frames / max(decode_seconds, 1e-9),
    }
