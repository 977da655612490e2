"""Which old tokens lie where a new token lies, in clips that two tokenizers have encoded.

Flows in: two prepared folders of the same videos, one by each tokenizer. Flows out: a
``Cooccurrence``.

    C[v, o] = volume in which new token v and old token o overlap, summed over all pairs of clips

Volume is measured in frames of the source video times the share of the picture (``overlap.py``).
Memory is bounded: clips are read one at a time, and of all pairs (v, o) at most ``max_pairs`` are
kept; beyond that the lightest are dropped and their share is recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.config import SPLITS
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.documents import open_shards
from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.data.shards import ShardSet
from cosmos_posttrain.data.source_runs import SourceRuns
from cosmos_posttrain.data.splits import split_digests
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.transfer.cooccurrence import Cooccurrence
from cosmos_posttrain.transfer.overlap import PicturePairs, frame_intervals, time_overlaps

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BUFFERED_PAIRS = 4_000_000


class PairSums:
    """Sums of volumes by key, at most ``max_pairs`` of them.

    Keys are ``new * old_vocab_size + old``. What is added is collected and summed in large
    portions.
    """

    def __init__(self, max_pairs: int) -> None:
        self.keys: NDArray[np.int64] = np.empty(0, np.int64)
        self.volumes: NDArray[np.float64] = np.empty(0)
        self.dropped = 0.0
        self._max_pairs = max_pairs
        self._limit = min(_BUFFERED_PAIRS, max_pairs)
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        self._num_waiting = 0

    def add(self, keys: NDArray[np.int64], volumes: NDArray[np.float64]) -> None:
        """Adds volumes; a key may stand there more than once."""
        self._waiting.append((keys, volumes))
        self._num_waiting += len(keys)
        if self._num_waiting >= self._limit:
            self.finish()

    def finish(self) -> None:
        """Sums what was collected; ``keys`` ascend afterwards."""
        if not self._waiting:
            return
        keys = np.concatenate([self.keys, *(k for k, _ in self._waiting)])
        volumes = np.concatenate([self.volumes, *(v for _, v in self._waiting)])
        self._waiting, self._num_waiting = [], 0
        order = np.argsort(keys, kind="stable")
        keys, volumes = keys[order], volumes[order]
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        self.keys, self.volumes = keys[starts], np.add.reduceat(volumes, starts)
        if len(self.keys) > self._max_pairs:
            # Down to three quarters, so that this is done now and then and not every time.
            num_kept = max(self._max_pairs * 3 // 4, 1)
            heaviest = np.sort(np.argsort(-self.volumes, kind="stable")[:num_kept])
            self.dropped += float(self.volumes.sum() - self.volumes[heaviest].sum())
            self.keys, self.volumes = self.keys[heaviest], self.volumes[heaviest]


@dataclass(frozen=True)
class _Clip:
    """One document and where it came from."""

    shards: ShardSet
    document: int
    row: DocumentRow

    def tokens(self, contract: Contract) -> NDArray[np.int64]:
        """(T, H * W) int64."""
        tokens = self.shards.tokens(self.document).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= contract.tokenizer.vocab_size:
            raise DatasetError(
                f"{self.shards.where(self.document)} holds tokens outside the vocabulary; prepare "
                "the data set again."
            )
        return tokens.reshape(contract.latent_shape[0], -1)


class PreparedFolder:
    """One of the two data sets.

    Raises:
        DatasetError: it is missing or damaged, or has no manifest.
    """

    def __init__(self, path: str) -> None:
        opened = open_shards(path)
        if opened.manifest is None:
            raise DatasetError(
                f"{path} has no manifest, so nobody knows which frames its tokens show; prepare it "
                "with prepare_dataset.py."
            )
        self.path = path
        self.shards = opened
        self.manifest: Manifest = opened.manifest
        self.contract = self.manifest.contract

    @functools.cached_property
    def _runs(self) -> SourceRuns:
        return self.shards.source_runs()

    def clips(self, documents: Iterable[int]) -> Iterator[_Clip]:
        """Clips by the number of their document."""
        for document in documents:
            yield _Clip(self.shards, document, self.shards.row(document))

    def documents(self, sources: set[str]) -> list[int]:
        """The documents of the given sources, ascending."""
        is_wanted = np.fromiter((name in sources for name in self._runs.names()), bool)
        return np.flatnonzero(np.repeat(is_wanted, self._runs.num_documents)).tolist()

    def training_sources(self, split_string: str, seed: int) -> set[str]:
        """The sources that training with this split sees."""
        splits = split_digests(self._runs.digests(seed), split_string).tolist()
        names = zip(self._runs.names(), splits, strict=True)
        return {name for name, split in names if split == SPLITS.index("train")}


def _spread(documents: list[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly over the whole list."""
    if len(documents) <= count:
        return documents
    return [documents[i * len(documents) // count] for i in range(count)]


def count_cooccurrence(
    old: PreparedFolder,
    new: PreparedFolder,
    sources: set[str],
    max_clips: int,
    max_pairs: int,
    record: dict[str, Any],
) -> Cooccurrence:
    """Overlaps of up to ``max_clips`` new clips with all old clips of the same videos.

    Args:
        old: encoded by the tokenizer that the model knows.
        new: encoded by the other one.
        sources: videos to use.
        max_clips: largest number of new clips, spread over all of them.
        max_pairs: largest number of token pairs to keep.
        record: kept in the result, with the counts.

    Raises:
        DatasetError: the clips cannot be compared, or no two of them show the same frames.
    """
    picture = PicturePairs.of(new.contract, old.contract)
    chosen = _spread(new.documents(sources), max_clips)
    named = {clip.row.source for clip in new.clips(chosen)}
    old_clips: dict[str, list[_Clip]] = {}
    for clip in old.clips(old.documents(named)):
        old_clips.setdefault(clip.row.source, []).append(clip)
    counter = _Counter(old.contract, new.contract, picture, max_pairs)
    progress = ProgressDisplay(len(chosen), "clips")
    for clip in new.clips(chosen):
        counter.add(clip, old_clips.get(clip.row.source, []))
        progress.advance(f"{counter.num_clip_pairs:,} pairs of clips")
    if not counter.num_clip_pairs:
        raise DatasetError(
            f"no clip of {new.path} shows the same frames of the same video as one of {old.path}; "
            "prepare both from the same --input_videos_dir."
        )
    return counter.result(record)


class _Counter:
    """The running sums."""

    def __init__(self, old: Contract, new: Contract, picture: PicturePairs, max_pairs: int) -> None:
        self.old, self.new, self.picture = old, new, picture
        self.sums = PairSums(max_pairs)
        self.occurrences: NDArray[np.int64] = np.zeros(new.tokenizer.vocab_size, np.int64)
        self.num_clips = self.num_clip_pairs = 0

    def add(self, clip: _Clip, candidates: list[_Clip]) -> None:
        """One new clip, and the old clips of its video."""
        when = frame_intervals(clip.row, self.new)
        tokens: NDArray[np.int64] | None = None
        covered = np.zeros(len(when), bool)
        for other in candidates:
            shared = time_overlaps(when, frame_intervals(other.row, self.old))
            if not shared.any():
                continue
            tokens = clip.tokens(self.new) if tokens is None else tokens
            old_tokens = other.tokens(self.old)
            for i, j in np.argwhere(shared):
                new_part = tokens[i][self.picture.new_cells] * self.old.tokenizer.vocab_size
                keys = new_part + old_tokens[j][self.picture.old_cells]
                self.sums.add(keys, self.picture.areas * shared[i, j])
            covered |= shared.any(axis=1)
            self.num_clip_pairs += 1
        if tokens is not None:
            self.num_clips += 1
            seen = tokens[covered].ravel()
            self.occurrences += np.bincount(seen, minlength=len(self.occurrences))

    def result(self, record: dict[str, Any]) -> Cooccurrence:
        """What was counted."""
        self.sums.finish()
        keys, volumes = self.sums.keys, self.sums.volumes
        counts = {
            "num_clips": self.num_clips,
            "num_clip_pairs": self.num_clip_pairs,
            "num_token_pairs": len(keys),
            "num_new_tokens": int(np.count_nonzero(self.occurrences)),
            "dropped_share": self.sums.dropped / (self.sums.dropped + float(volumes.sum())),
        }
        size = self.old.tokenizer.vocab_size
        return Cooccurrence(
            self.old.tokenizer,
            self.new.tokenizer,
            (keys // size).astype(np.int32),
            (keys % size).astype(np.int32),
            volumes.astype(np.float32),
            self.occurrences,
            {**record, **counts},
        )
