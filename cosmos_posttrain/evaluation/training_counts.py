"""How often tokens, and pairs of a token and the one before it at the same place, occur.

Flows in: clips of the training split, one at a time. Flows out: ``TrainingCounts`` of bounded size,
which is all that the baselines are fitted on.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.transfer.counting import PairSums

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        num_failures: that could not be read.
    """

    tokens: NDArray[np.int64]
    kept: NDArray[np.int64]
    num_pairs: int
    keys: NDArray[np.int64]
    pair_counts: NDArray[np.float64]
    dropped_share: float
    num_clips: int
    num_failures: int = 0

    @property
    def vocab_size(self) -> int:
        """Tokens that there are."""
        return len(self.tokens)


def count(
    clips: Iterable[NDArray[np.int64]], vocab_size: int, num_frames: int, max_pairs: int
) -> TrainingCounts:
    """Counts clips (T * H * W,) int64.

    Args:
        clips: read once, one at a time.
        vocab_size: each token is in [0, vocab_size).
        num_frames: latent frames of a clip.
        max_pairs: largest number of distinct pairs to keep; beyond it the rarest are dropped.
    """
    tokens, kept = (np.zeros(vocab_size, np.int64) for _ in range(2))
    pairs, num_pairs, num_clips = PairSums(max_pairs), 0, 0
    for clip in clips:
        frames = clip.reshape(num_frames, -1)
        before, after = frames[:-1].ravel(), frames[1:].ravel()
        tokens += np.bincount(clip, minlength=vocab_size)
        kept += np.bincount(after[before == after], minlength=vocab_size)
        pairs.add(before * vocab_size + after, np.ones(len(after)))
        num_pairs += len(after)
        num_clips += 1
    pairs.finish()
    share = pairs.dropped / num_pairs if num_pairs else 0.0
    return TrainingCounts(tokens, kept, num_pairs, pairs.keys, pairs.volumes, share, num_clips)


def count_split(dataset: TokenDataset, max_clips: int, max_pairs: int) -> TrainingCounts:
    """Counts up to ``max_clips`` clips of a split, spread evenly over it."""
    size, num_failures = min(len(dataset), max_clips), 0
    progress = ProgressDisplay(size, "clips", "counting the training split")

    def clips() -> Iterable[NDArray[np.int64]]:
        nonlocal num_failures
        for number in range(size):
            try:
                yield dataset[number * len(dataset) // size].numpy()
            except DatasetError:
                num_failures += 1
            progress.advance()

    counts = count(clips(), dataset.vocab_size, dataset.latent_shape.time, max_pairs)
    return dataclasses.replace(counts, num_failures=num_failures)
