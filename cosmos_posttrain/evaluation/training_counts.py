"""How often tokens, and pairs of a token and the one before it at the same place, occur.

Flows in: clips of the training split, one at a time. Flows out: ``TrainingCounts`` of bounded size,
one of each half of the source videos, which is all that the baselines are fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.transfer.counting import PairSums

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TrainingCounts:
    """Counts over training clips.

    Attributes:
        tokens: (V,) int64, how often each occurs, first latent frames included.
        kept: (V,) int64, how often each follows itself at the same place.
        num_pairs: all tokens that have one before them.
        keys: (P,) int64 ascending, ``before * V + token`` of the pairs that were kept.
        pair_counts: (P,) float64, how often each occurs.
        dropped_share: of all pairs, those that memory did not allow to keep.
        num_clips: that were counted.
    """

    tokens: NDArray[np.int64]
    kept: NDArray[np.int64]
    num_pairs: int
    keys: NDArray[np.int64]
    pair_counts: NDArray[np.float64]
    dropped_share: float
    num_clips: int

    @property
    def vocab_size(self) -> int:
        """Tokens that there are."""
        return len(self.tokens)


def joined(first: TrainingCounts, second: TrainingCounts) -> TrainingCounts:
    """Both together."""
    keys, places = np.unique(np.concatenate([first.keys, second.keys]), return_inverse=True)
    times = np.concatenate([first.pair_counts, second.pair_counts])
    dropped = first.dropped_share * first.num_pairs + second.dropped_share * second.num_pairs
    num_pairs = first.num_pairs + second.num_pairs
    return TrainingCounts(
        first.tokens + second.tokens,
        first.kept + second.kept,
        num_pairs,
        keys,
        np.bincount(places, times, len(keys)).astype(np.float64),
        dropped / max(num_pairs, 1),
        first.num_clips + second.num_clips,
    )


class Counter:
    """Running counts of clips (T * H * W,) int64.

    Args:
        vocab_size: each token is in [0, vocab_size).
        num_frames: latent frames of a clip.
        max_pairs: largest number of distinct pairs to keep; beyond it the rarest are dropped.
    """

    def __init__(self, vocab_size: int, num_frames: int, max_pairs: int) -> None:
        self._size, self._num_frames = vocab_size, num_frames
        self._tokens, self._kept = (np.zeros(vocab_size, np.int64) for _ in range(2))
        self._pairs, self._num_pairs, self._num_clips = PairSums(max_pairs), 0, 0

    def add(self, clip: NDArray[np.int64]) -> None:
        """Counts one more."""
        frames = clip.reshape(self._num_frames, -1)
        before, after = frames[:-1].ravel(), frames[1:].ravel()
        self._tokens += np.bincount(clip, minlength=self._size)
        self._kept += np.bincount(after[before == after], minlength=self._size)
        self._pairs.add(before * self._size + after, np.ones(len(after)))
        self._num_pairs += len(after)
        self._num_clips += 1

    def result(self) -> TrainingCounts:
        """What was counted."""
        self._pairs.finish()
        return TrainingCounts(
            self._tokens,
            self._kept,
            self._num_pairs,
            self._pairs.keys,
            self._pairs.volumes,
            self._pairs.dropped / max(self._num_pairs, 1),
            self._num_clips,
        )


def count_split(
    dataset: TokenDataset, max_clips: int, max_pairs: int
) -> tuple[TrainingCounts, TrainingCounts, int]:
    """Counts up to ``max_clips`` clips of a split, spread evenly over it.

    Returns:
        The counts of each half of its source videos (of its clips, where there is one video), and
        how many clips could not be read.
    """
    size, num_failures = min(len(dataset), max_clips), 0
    numbers = np.unique(dataset.source_numbers(), return_inverse=True)[1]
    halves = numbers % 2 if numbers.any() else np.arange(len(dataset)) % 2
    counters = [
        Counter(dataset.vocab_size, dataset.latent_shape.time, max(max_pairs // 2, 1))
        for _ in range(2)
    ]
    progress = ProgressDisplay(size, "clips", "counting the training split")
    for place in range(size):
        number = place * len(dataset) // size
        try:
            counters[halves[number]].add(dataset[number].numpy())
        except DatasetError:
            num_failures += 1
        progress.advance()
    first, second = (counter.result() for counter in counters)
    return first, second, num_failures
