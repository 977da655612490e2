"""One shard of a preparation: a pure function of its inputs, whoever runs it, wherever.

Flows in: a list of sources, what to cut out of them, and the encoder. Flows out: the shard's files
and a ``ShardRecord`` of what became of each source: read, rejected by a filter, or failed.

    sources --read--> clips (3, T, H, W) uint8 --encoder--> (t, h, w) int32 --> .bin/.idx, rows

A shard is encoded in batches that never reach over its end, with a fixed number of threads, so its
bytes depend only on the videos, the settings, and the device and dtype of the encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.layout import shard_name
from cosmos_posttrain.data.manifest import DocumentRow, Failure
from cosmos_posttrain.errors import TokenizerError, VideoError
from cosmos_posttrain.geometry import Compression
from cosmos_posttrain.prepare.decoding import ClipSpec
from cosmos_posttrain.prepare.folder import Rejection, ShardRecord, write_shard
from cosmos_posttrain.prepare.sources import VideoSource, missing_prompt
from cosmos_posttrain.video import Clip, to_float


class ClipEncoder(Protocol):
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


class SourceRejectedError(Exception):
    """Raised while a source is read: a filter leaves it out, for a reason of a few words."""


# Clips of a source; raises VideoError (it failed) or SourceRejectedError.
ReadSource = Callable[[VideoSource], Iterator[Clip]]


@dataclass(frozen=True)
class ShardJob:
    """All that decides a shard's bytes, but the encoder.

    Attributes:
        number: of the shard.
        sources: in order.
        spec: what to cut out of each.
        contract: what all documents share.
        batch_size: clips in one call of the encoder.
        encoder_threads: CPU threads of the encoder.
        folder: where the shard is written.
        decoder: name of the library that decodes, whoever runs the job: another gives other tokens.
    """

    number: int
    sources: tuple[VideoSource, ...]
    spec: ClipSpec
    contract: Contract
    batch_size: int
    encoder_threads: int
    folder: Path
    decoder: str

    def run(self, encoder: ClipEncoder, read: ReadSource) -> ShardRecord:
        """Reads, encodes and writes; sources that cannot be read are part of the result.

        Args:
            encoder: of the contract.
            read: gives a source's clips as ``decoding.read_source`` does, perhaps decoded ahead;
                called once for each source, in order.

        Raises:
            TokenizerError: the encoder does not make what the contract says.
            SaveError: the disk is full.
            CosmosPosttrainError: the machine cannot read now.
        """
        batches = _Batches(encoder, self.contract, self.batch_size)
        failures: list[Failure] = []
        rejections: list[Rejection] = []
        with pinned(self.encoder_threads):
            for source in self.sources:
                if reason := self.refusal(source):
                    failures.append(Failure(_printable(source.name), reason))
                    continue
                batches.begin(source)
                try:
                    for clip in read(source):
                        batches.add(clip)
                except VideoError as error:
                    batches.drop()
                    failures.append(Failure(_printable(source.name), _printable(str(error))))
                except SourceRejectedError as error:
                    batches.drop()
                    rejections.append(Rejection(source.name, str(error)))
            documents = batches.finish()
        return write_shard(
            self.folder,
            shard_name(self.number),
            self.contract.dtype,
            documents,
            failures,
            rejections,
        )

    def refusal(self, source: VideoSource) -> str | None:
        """Why a source is not even read, as a sentence; None if it is."""
        if self.contract.text_encoder is None:
            return None
        return missing_prompt(source)


def _printable(text: str) -> str:
    """Text that every file can hold, also of names that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


@contextmanager
def pinned(num_threads: int) -> Iterator[None]:
    """Fixed thread count and deterministic convolutions while encoding."""
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    torch.set_num_threads(num_threads)
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.deterministic = before[1]


class _Batches:
    """Clips of one shard on their way through the encoder, in batches of a fixed size."""

    def __init__(self, encoder: ClipEncoder, contract: Contract, batch_size: int) -> None:
        self._encoder = encoder
        self._contract = contract
        self._batch_size = batch_size
        self._position = -1
        self._source: VideoSource | None = None
        self._pending: list[tuple[int, DocumentRow, torch.Tensor]] = []
        self._done: list[tuple[int, DocumentRow, Any]] = []
        self._dropped: set[int] = set()

    def begin(self, source: VideoSource) -> None:
        """What is added from now on comes from this source."""
        self._position += 1
        self._source = source

    def add(self, clip: Clip) -> None:
        """Takes a clip; encodes when a batch is full."""
        assert self._source is not None
        row = DocumentRow(
            0,
            self._source.name,
            clip.start_frame,
            clip.stride,
            clip.num_repeated,
            clip.fps,
            None if self._contract.text_encoder else self._source.prompt,
            self._source.prompt_number,
        )
        self._pending.append((self._position, row, clip.frames))
        if len(self._pending) == self._batch_size:
            self._encode()

    def drop(self) -> None:
        """The source that was begun last leaves no clip behind."""
        self._dropped.add(self._position)

    def _encode(self) -> None:
        if not self._pending:
            return
        frames = torch.stack([frames for _, _, frames in self._pending])
        tokens = self._encoder.encode(to_float(frames.to(self._encoder.device))).cpu()
        expected = (len(self._pending), *self._contract.latent_shape)
        vocab_size = self._contract.tokenizer.vocab_size
        if tuple(tokens.shape) != expected or tokens.min() < 0 or tokens.max() >= vocab_size:
            raise TokenizerError(
                f"the tokenizer {self._encoder.id} made tokens of shape {tuple(tokens.shape)} from "
                f"{int(tokens.min())} to {int(tokens.max())}; expected {expected} below "
                f"{vocab_size}: it is not the tokenizer that its files say."
            )
        for (position, row, _), grid in zip(self._pending, tokens, strict=True):
            self._done.append((position, row, grid.flatten().numpy()))
        self._pending = []

    def finish(self) -> list[tuple[DocumentRow, Any]]:
        """The shard's documents: row and tokens."""
        self._encode()
        kept = (item[1:] for item in self._done if item[0] not in self._dropped)
        return [
            (dataclasses.replace(row, document=number), tokens)
            for number, (row, tokens) in enumerate(kept)
        ]
