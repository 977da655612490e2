"""The curves of a run, as many points of them as a picture can show.

Flows in: ``metrics.jsonl``, read a line at a time. Flows out: for each quantity, steps and values,
thinned to the means of equal stretches of steps.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from cosmos_posttrain.runlog import iter_rows

LOSS, VALIDATION, RATE, NORM = "reduced_train_loss", "val_loss", "lr", "grad_norm"
SPEED, SAMPLES = "tokens_per_second", "consumed_samples"
QUANTITIES = (LOSS, VALIDATION, RATE, NORM, SPEED)

MAX_POINTS = 480
_SMOOTHED_SHARE = 15  # a smoothed point is the mean of this part of a curve


@dataclass(frozen=True)
class Curve:
    """One quantity over the steps of a run.

    Attributes:
        steps: (N,) float64; completed optimizer steps, from 1 on.
        values: (N,) float64, finite.
    """

    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    def thinned(self, max_points: int = MAX_POINTS) -> Curve:
        """Means over equal numbers of neighbours, at most ``max_points`` of them."""
        if len(self) <= max_points:
            return self
        starts = np.linspace(0, len(self), max_points, endpoint=False).astype(np.int64)
        counts = np.diff(np.append(starts, len(self)))
        return Curve(*(np.add.reduceat(a, starts) / counts for a in (self.steps, self.values)))

    def smoothed(self) -> Curve:
        """Means over a fifteenth of the curve around each point, fewer at its ends."""
        half = len(self) // (2 * _SMOOTHED_SHARE)
        sums = np.concatenate([[0.0], np.cumsum(self.values)])
        places = np.arange(len(self))
        reach = np.minimum(np.minimum(places, len(self) - 1 - places), half)
        means = (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
        return Curve(self.steps, means)

    def mean(self, first: int, last: int) -> float:
        """Mean value of the points ``first`` to ``last - 1``."""
        return float(self.values[first:last].mean())


@dataclass(frozen=True)
class Curves:
    """All that ``metrics.jsonl`` tells of a run.

    Attributes:
        of: quantity -> curve; empty where it was never recorded.
        num_steps: completed optimizer steps.
        consumed_samples: clips that they took; None where that was not recorded.
    """

    of: dict[str, Curve]
    num_steps: int
    consumed_samples: int | None

    def at(self, quantity: str, step: float) -> float | None:
        """The value that was recorded at a step; None where none was."""
        curve = self.of[quantity]
        place = int(np.searchsorted(curve.steps, step))
        if place == len(curve) or curve.steps[place] != step:
            return None
        return float(curve.values[place])


def read_curves(path: Path) -> Curves:
    """Reads a ``metrics.jsonl``; values that are no finite numbers are left out."""
    steps = {name: array("d") for name in QUANTITIES}
    values = {name: array("d") for name in QUANTITIES}
    num_steps, samples = 0, None
    for row in iter_rows(path):
        step = int(row["step"]) + 1
        num_steps = max(num_steps, step)
        for name in QUANTITIES:
            if is_number(value := row.get(name)):
                steps[name].append(step)
                values[name].append(value)
        if is_number(value := row.get(SAMPLES)):
            samples = int(value)
    curves = {name: Curve(np.array(steps[name]), np.array(values[name])) for name in QUANTITIES}
    return Curves(curves, num_steps, samples)


def is_number(value: object) -> TypeGuard[int | float]:
    """True for finite numbers; a file may hold anything."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def shown_steps(curves: Curves, max_rows: int) -> Sequence[int]:
    """Steps for a table: those with a validation, else evenly spaced; first and last among them."""
    recorded = curves.of[VALIDATION] if len(curves.of[VALIDATION]) else curves.of[LOSS]
    if not len(recorded):
        return []
    places = np.unique(np.linspace(0, len(recorded) - 1, max_rows).round().astype(np.int64))
    return [int(step) for step in recorded.steps[places]]
