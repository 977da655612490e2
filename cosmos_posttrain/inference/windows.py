"""How many drafts to feed at once, from how often they have been right.

Flows in: after each pass, how many drafts of each clip were right. Flows out: the next window. The
tokens do not depend on it, only how long they take; tensor-parallel ranks see the same tokens, so
they choose the same windows.

    tokens of a pass of w    E(w) = 1 + sum over j < w of P(the first j drafts are right)
    its time                 c(M) of the M = w * clips rows that go through the model, c(1) = 1
    chosen                   the w of the largest E(w) / c(M)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LARGEST_WINDOW = 64
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_FIRST_SIZE = 16
# c(M) = first + second * M for M > 1. On the CPU measured, see docs/decoding.md; on a GPU assumed:
# some hundred rows cost what one does, which waits for the weights.
_COSTS = {"cpu": (1.4, 0.036), "cuda": (1.05, 0.003)}
# What was seen so many passes ago counts for a third.
_MEMORY = 24
_FORGOTTEN = 0.1
# Where drafts do not pay, they are tried again after so many passes, as many as this.
_PAUSE, _TRIAL = 32, 8


class WindowChoice:
    """The next window of some clips that are decoded together.

    Args:
        batch_size: clips.
        device: that they are decoded on.
        largest: window that there is room for.
        fixed: always this one.
    """

    def __init__(
        self, batch_size: int, device: torch.device, largest: int, fixed: int | None = None
    ) -> None:
        self._batch_size, self._fixed = batch_size, fixed
        self._first, self._second = _COSTS.get(device.type, _COSTS["cuda"])
        self._largest = largest
        # How often the first 1, 2, ... drafts were fed, and how often all of them were right.
        self._fed = [0.0] * LARGEST_WINDOW
        self._right = [0.0] * LARGEST_WINDOW
        self._num_without, self._is_new = 0, True

    def next(self) -> int:
        """Tokens of each clip to feed at once, the known one included."""
        if self._fixed is not None:
            return min(self._fixed, self._largest)
        if self._is_new:
            size = _FIRST_SIZE
        elif self._num_without >= _PAUSE:
            size = _TRIAL
        else:
            expected = self._expected()
            size = max(_SIZES, key=lambda w: expected[w - 1] / self._cost(w * self._batch_size))
        return max(1, min(size, self._largest))

    def learn(self, num_right: Sequence[int], num_drafts: int) -> None:
        """Takes in a pass.

        Args:
            num_right: of each clip that was not complete, drafts that were right.
            num_drafts: that each had.
        """
        if self._fixed is not None:
            return
        self._num_without = self._num_without + 1 if num_drafts == 0 else 0
        self._is_new = False
        keep = 1 - 1 / _MEMORY
        for number in range(LARGEST_WINDOW):
            is_fed = number < num_drafts
            reached = sum(count > number for count in num_right) if is_fed else 0
            self._fed[number] = keep * self._fed[number] + is_fed * len(num_right)
            self._right[number] = keep * self._right[number] + reached

    def _expected(self) -> list[float]:
        """Tokens of a pass with windows of 1, 2, ...: seen where drafts were fed, else guessed."""
        total, chance, found, step = 1.0, 1.0, [1.0], 0.5
        for number, (fed, right) in enumerate(zip(self._fed, self._right, strict=True), 1):
            if fed > _FORGOTTEN:
                chance = min(chance, right / fed)
                step = chance ** (1 / number)
            else:
                chance *= step
            total += chance
            found.append(total)
        return found

    def _cost(self, rows: int) -> float:
        return 1.0 if rows == 1 else self._first + self._second * rows
