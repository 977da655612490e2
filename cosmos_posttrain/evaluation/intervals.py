"""Confidence intervals of means over clips, by a bootstrap over source videos.

Clips of one video are alike, so videos are drawn with replacement, each with all its clips (the
cluster bootstrap: Davison & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8).
Flows in: sums of each clip and the number of its video. Flows out: percentiles. All columns share
one set of draws, so that differences of columns are paired.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEVEL = 0.95
NUM_RESAMPLES = 1000
_SEED = 0


def resampled_means(
    sums: NDArray[np.float64], sources: NDArray[np.int64], num_resamples: int = NUM_RESAMPLES
) -> NDArray[np.float64] | None:
    """Means over clips, had other videos been drawn.

    Args:
        sums: (N, K) of each clip.
        sources: (N,) number of each clip's video, any numbers.
        num_resamples: draws.

    Returns:
        (num_resamples, K); None with fewer than two videos, of which nothing can be said.
    """
    numbers, clips = np.unique(sources, return_inverse=True)
    if len(numbers) < 2:
        return None
    totals = np.zeros((len(numbers), sums.shape[1] + 1))
    np.add.at(totals, clips, np.column_stack([sums, np.ones(len(sums))]))
    generator = np.random.default_rng(_SEED)
    means = np.empty((num_resamples, sums.shape[1]))
    for number in range(num_resamples):
        drawn = np.bincount(generator.integers(0, len(totals), len(totals)), minlength=len(totals))
        whole = drawn @ totals
        means[number] = whole[:-1] / whole[-1]
    return means


def interval(values: NDArray[np.float64]) -> list[float]:
    """The middle ``LEVEL`` of resampled values (R,): its two ends."""
    ends = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(end) for end in ends]
