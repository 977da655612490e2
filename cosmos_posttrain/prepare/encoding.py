"""Clips to tokens, shard by shard.

Flows in: the shards of this rank, as lists of videos. Flows out: each shard's documents, written.

A shard is encoded in batches that never reach over its end, with a fixed number of threads, so its
bytes depend only on the videos, the settings, and the device and dtype of the encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.manifest import DocumentRow, Failure
from cosmos_posttrain.errors import TokenizerError, VideoError
from cosmos_posttrain.geometry import Compression
from cosmos_posttrain.prepare.decoding import ClipSpec, DecodingPool
from cosmos_posttrain.prepare.folder import write_shard
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.video import Clip, to_float

if TYPE_CHECKING:
    from cosmos_posttrain.prepare.folder import OutputFolder
    from cosmos_posttrain.prepare.prepare import PrepareConfig
    from cosmos_posttrain.prepare.sources import VideoSource


class Encoder(Protocol):
    """What preparation needs of a tokenizer; ``VideoTokenizer`` is one."""

    id: str
    sha256: str
    compression: Compression
    levels: tuple[int, ...]
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) float32 in [-1, 1] -> (B, t, h, w) int32."""
        ...


@contextmanager
def _pinned(num_threads: int) -> Iterator[None]:
    """Fixed thread count and deterministic convolutions while encoding."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic = before[1]


def encode_shards(
    shards: dict[int, list[VideoSource]],
    spec: ClipSpec,
    encoder: Encoder,
    output: OutputFolder,
    config: PrepareConfig,
) -> None:
    """Encodes and writes the shards of this rank, decoding ahead over shard borders."""
    sources = [source for members in shards.values() for source in members]
    clips_ahead = max(2, config.batch_size)
    with (
        _pinned(config.encoder_threads),
        DecodingPool(sources, spec, config.num_workers, clips_ahead) as pool,
    ):
        progress = ProgressDisplay(len(sources), "videos")
        position = num_failed = 0
        for number, members in shards.items():
            work = _ShardWork(encoder, output.contract, config.batch_size)
            for source in members:
                num_failed += not work.add_source(source, pool, position)
                progress.advance(f"{num_failed} failed")
                position += 1
            dtype = output.contract.dtype
            write_shard(output.folder, number, dtype, work.finish(), work.failures, [])


class _ShardWork:
    """Clips of one shard on their way through the encoder, in batches of a fixed size."""

    def __init__(self, encoder: Encoder, contract: Contract, batch_size: int) -> None:
        self._encoder = encoder
        self._contract = contract
        self._batch_size = batch_size
        self._pending: list[tuple[int, VideoSource, Clip]] = []
        self._done: list[tuple[int, VideoSource, Clip, Any]] = []
        self._failed: set[int] = set()
        self.failures: list[Failure] = []

    def add_source(self, source: VideoSource, pool: DecodingPool, position: int) -> bool:
        """Takes a source's clips, encoding whenever a batch is full; True if it could be read."""
        try:
            for clip in pool.clips(position):
                self._pending.append((position, source, clip))
                if len(self._pending) == self._batch_size:
                    self._encode()
        except VideoError as error:
            self._failed.add(position)
            self.failures.append(Failure(source.name, str(error)))
            return False
        return True

    def _encode(self) -> None:
        if not self._pending:
            return
        frames = torch.stack([clip.frames for _, _, clip in self._pending])
        tokens = self._encoder.encode(to_float(frames.to(self._encoder.device))).cpu()
        expected = (len(self._pending), *self._contract.latent_shape)
        vocab_size = self._contract.tokenizer.vocab_size
        if tuple(tokens.shape) != expected or tokens.min() < 0 or tokens.max() >= vocab_size:
            raise TokenizerError(
                f"the tokenizer {self._encoder.id} made tokens of shape {tuple(tokens.shape)} from "
                f"{int(tokens.min())} to {int(tokens.max())}; expected {expected} below "
                f"{vocab_size}: it is not the tokenizer that its files say."
            )
        for (position, source, clip), grid in zip(self._pending, tokens, strict=True):
            bare = dataclasses.replace(clip, frames=clip.frames[:, :0].clone())  # frees the pixels
            self._done.append((position, source, bare, grid.flatten().numpy()))
        self._pending = []

    def finish(self) -> list[tuple[DocumentRow, Any]]:
        """The shard's documents; a source that failed half-way leaves none."""
        self._encode()
        documents: list[tuple[DocumentRow, Any]] = []
        for position, source, clip, tokens in self._done:
            if position not in self._failed:
                row = DocumentRow(
                    len(documents),
                    source.name,
                    clip.start_frame,
                    clip.stride,
                    clip.num_repeated,
                    clip.fps,
                    source.prompt,
                )
                documents.append((row, tokens))
        return documents
