"""Whether generated clips of the small world do what was asked, and where their objects end.

Flows in: generated frames as (T, H, W, 3) uint8 with the truth of the clips that they continue.
Flows out: the directions that objects took, whether they are the wanted ones, how far from the
truth they ended beside two yardsticks without a model, and how sure a share of clips is. numpy
only. An object that is not found has no direction, and counts with the picture's diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.evaluation.positions import (
    direction_name,
    find_objects,
    position_errors,
)
from cosmos_posttrain.evaluation.world_truth import WorldTruth

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

# Of the normal distribution: 95% lie within so many standard deviations.
_Z = 1.959964
_PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Share:
    """How many of a number of cases.

    Attributes:
        hits: cases that count.
        total: all of them, at least one.
    """

    hits: int
    total: int

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval: which chances would make such a share likely."""
        share, scale = self.value, _Z**2 / self.total
        middle = (share + scale / 2) / (1 + scale)
        reach = math.sqrt(share * (1 - share) * scale + scale**2 / 4) / (1 + scale)
        return max(middle - reach, 0.0), min(middle + reach, 1.0)


def moves(found: Array, truth: WorldTruth, num_given: int) -> Array:
    """From the last given frame, where the truth is known, to the last frame.

    Args:
        found: (T, K, 2) positions in a generated clip, NaN where an object is not found.
        truth: of the clip whose first ``num_given`` frames were given.
        num_given: at least one.

    Returns:
        (K, 2) pixels, NaN where an object is not found in the last frame.
    """
    return found[-1] - truth.positions[num_given - 1]


def directions_taken(found: Array, truth: WorldTruth, num_given: int) -> list[str]:
    """The nearest of four directions in which each object went, "" for none; see ``moves``."""
    return [direction_name(move) for move in moves(found, truth, num_given)]


def follows(found: Array, truth: WorldTruth, wanted: Sequence[str], num_given: int) -> bool:
    """Whether every object went where it should, or stayed where that is wanted ("").

    Args:
        found: (T, K, 2), see ``moves``.
        truth: see ``moves``.
        wanted: K names of directions, such as those of the truth's objects.
        num_given: see ``moves``.
    """
    in_last = np.isfinite(found[-1]).all()
    return bool(in_last) and directions_taken(found, truth, num_given) == list(wanted)


def locate(frames: NDArray[np.uint8], truth: WorldTruth) -> Array:
    """(T, H, W, 3) uint8 -> (T, K, 2): where the truth's objects are; NaN for not found."""
    return find_objects(frames, truth.colors, truth.diameters)


def last_errors(found: Array, truth: WorldTruth) -> Array:
    """(K,) pixels from the truth in the last of the T frames."""
    last = truth.positions[len(found) - 1]
    return position_errors(found[-1], last, truth.height, truth.width)


def yardsticks(truth: WorldTruth, num_given: int) -> dict[str, Array]:
    """Errors in the last frame, (K,) pixels each, of two guesses that need no model.

    Both start from the true positions in the given frames, at least two: ``repeat`` leaves
    everything where it is, ``extrapolate`` lets it go on at its last velocity.
    """
    last, before, end = truth.positions[[num_given - 1, num_given - 2, -1]]
    steps = len(truth.positions) - num_given
    guesses = {"repeat": last, "extrapolate": last + steps * (last - before)}
    return {
        name: position_errors(guess, end, truth.height, truth.width)
        for name, guess in guesses.items()
    }


def chance_interval(
    taken: Sequence[str], wanted: Sequence[str], seed: int = 0
) -> tuple[float, float]:
    """Where the share of agreement lies, in 95% of random orders of what is wanted.

    Args:
        taken: N directions.
        wanted: N directions.
        seed: of the orders.
    """
    rng = np.random.default_rng(seed)
    first, second = np.array(taken), np.array(wanted)
    shares = [np.mean(first == rng.permutation(second)) for _ in range(_PERMUTATIONS)]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)
