"""Sums of token scores by clip and by place, and the figures that they come to.

Flows in: ``Scores`` (B, N) by the clip's tokens. Flows out: a ``Tally`` of bounded size (five
numbers a clip, two a place) and, over all clips, a dict of figures for ``metrics.json``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.evaluation.intervals import interval
from cosmos_posttrain.evaluation.scoring import NUM_TOP, Scores
from cosmos_posttrain.geometry import LatentShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of a clip, each the sum over its predicted tokens.
COLUMNS = (
    "nats_per_token",
    "top_1",
    "top_5",
    f"top_{NUM_TOP}",
    f"top_{NUM_TOP}_cross_entropy",
)


@dataclass
class Tally:
    """Sums of one predictor's scores over the clips so far.

    Attributes:
        clips: (all clips, 5) float64, ``COLUMNS``; NaN for clips that are not done or not read.
        places: (2, T * H * W) float64, nats and tokens foreseen, over the clips so far.
        num_done: clips so far.
    """

    clips: NDArray[np.float64]
    places: NDArray[np.float64]
    num_done: int = 0

    @classmethod
    def empty(cls, num_clips: int, num_tokens: int) -> Tally:
        """For so many clips of so many tokens."""
        return cls(np.full((num_clips, len(COLUMNS)), np.nan), np.zeros((2, num_tokens)))

    def add(self, scores: Scores, is_read: NDArray[np.bool_]) -> None:
        """Takes in the next clips.

        Args:
            scores: (B, T * H * W) by the clip's tokens; rank -1 where a token is not predicted.
            is_read: (B,) whether there is such a clip; the others leave NaN.
        """
        is_predicted = scores.rank >= 0
        columns = (
            scores.nll,
            scores.rank == 0,
            scores.is_among(5),
            scores.is_among(NUM_TOP),
            scores.top_cross_entropy(),
        )
        values = np.stack([np.where(is_predicted, column, 0) for column in columns], axis=-1)
        rows = slice(self.num_done, self.num_done + len(is_read))
        self.clips[rows] = np.where(is_read[:, None], values.sum(axis=1, dtype=np.float64), np.nan)
        self.places += values[is_read][:, :, :2].sum(axis=0, dtype=np.float64).T
        self.num_done += len(is_read)

    @property
    def is_read(self) -> NDArray[np.bool_]:
        """(all clips,) bool: which are in the sums."""
        return ~np.isnan(self.clips[:, 0])


def figures(
    tally: Tally, shape: LatentShape, num_given: int, means: NDArray[np.float64] | None
) -> dict[str, Any]:
    """What a tally of all clips comes to; null where there is nothing to say.

    Args:
        tally: of at least one clip.
        shape: of the clips.
        num_given: first tokens of a clip that are not predicted.
        means: (R, 5) resampled means of the clips' sums, see ``intervals``; None for no intervals.
    """
    num_predicted = shape.num_tokens - num_given
    read = tally.clips[tally.is_read]
    average = dict(zip(COLUMNS, (read.mean(axis=0) / num_predicted).tolist(), strict=True))
    nats = average["nats_per_token"]
    found: dict[str, Any] = {
        **average,
        "bits_per_token": nats / math.log(2),
        "perplexity": _exp(nats),
    }
    if means is None:
        found["ci95"] = None
    else:
        ends = [interval(column) for column in (means / num_predicted).T]
        found["ci95"] = dict(zip(COLUMNS, ends, strict=True))
        low, high = found["ci95"]["nats_per_token"]
        found["ci95"]["bits_per_token"] = [low / math.log(2), high / math.log(2)]
        found["ci95"]["perplexity"] = [_exp(low), _exp(high)]
    nats_of_places, hits_of_places = (tally.places / len(read)).reshape(2, *shape)
    is_predicted = (np.arange(shape.num_tokens) >= num_given).reshape(shape)
    found["per_latent_frame"] = _means(nats_of_places, is_predicted, (1, 2))
    found["top_1_per_latent_frame"] = _means(hits_of_places, is_predicted, (1, 2))
    found["per_position"] = _means(nats_of_places, is_predicted, (0,))
    return found


def _means(
    values: NDArray[np.float64], is_predicted: NDArray[np.bool_], axes: tuple[int, ...]
) -> list[Any]:
    """Means over axes of what is predicted; None where nothing is."""
    counts = is_predicted.sum(axis=axes)
    sums = np.where(is_predicted, values, 0).sum(axis=axes)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return _without_nan(means.tolist())


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
