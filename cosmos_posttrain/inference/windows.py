"""How many tokens to feed at once, from how many of them came to be known.

Flows in: after each pass, how many tokens of each clip became known. Flows out: the next window.
The tokens do not depend on it, only how long they take; tensor-parallel ranks see the same tokens,
so they choose the same windows.

    rate    tokens of a clip that a pass of w makes known, as seen; of a wider one a bold guess
    cost    time of a pass of the M = w * clips rows, c(M), c(1) = 1
    chosen  the size of the largest rate / cost; left alone for some passes, then chosen again
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

LARGEST_WINDOW = 64
_SIZES = (1, 2, 4, 8, 16, 32, 64)
# Rows that the first window and every trial have at most.
_FIRST_ROWS = 32
# c(M) = first + second * M for M > 1. On the CPU measured, see docs/decoding.md; on a GPU assumed:
# some hundred rows cost what one does, which waits for the weights.
_COSTS = {"cpu": (1.4, 0.036), "cuda": (1.05, 0.003)}
# Passes of one size, of which the first few are not counted: drafts get better by being fed.
_STAY, _UNCOUNTED = 6, 2
# A rate is a mean of about so many passes, and forgotten when it was not seen for so many.
_MEMORY, _STALE = 16, 160
# What a window twice as wide is guessed to make of a rate, until it was tried.
_WIDER = 1.6
# Where drafts do not pay, windows of so many rows are tried again after so many passes.
_TRIAL_ROWS, _PAUSE = 8, 192


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
        self._sizes = tuple(size for size in _SIZES if size <= largest)
        self._rates: dict[int, float] = {}
        self._last_seen: dict[int, int] = {}
        self._narrower = dict.fromkeys(self._sizes, 0.0)
        self._size = self._bold(_FIRST_ROWS)
        self._num_passes = self._num_here = 0

    def next(self) -> int:
        """Tokens of each clip to feed at once, the known one included."""
        if self._fixed is not None:
            return min(self._fixed, self._largest)
        num_here = self._num_here
        if self._size == 1 and num_here >= _PAUSE:
            self._go_to(self._bold(_TRIAL_ROWS))
        elif num_here >= _STAY:
            self._go_to(self._best())
        return self._size

    def learn(self, num_known: Sequence[int]) -> None:
        """Takes in a pass: of each clip that was not complete, tokens that became known."""
        self._num_passes += 1
        self._num_here += 1
        if self._num_here <= _UNCOUNTED:
            return
        share = 1 / min(self._num_here - _UNCOUNTED, _MEMORY)
        for size in self._sizes:
            # A narrower window would have made known what lies in it.
            seen = sum(min(count, size) for count in num_known) / len(num_known)
            if size < self._size:
                self._narrower[size] += share * (seen - self._narrower[size])
            elif size == self._size:
                self._rates[size] = (1 - share) * self._rates.get(size, seen) + share * seen
                self._last_seen[size] = self._num_passes

    def _bold(self, rows: int) -> int:
        """The largest size of so many rows in all, at least 2 to learn from."""
        return max(size for size in self._sizes if size <= max(2, rows // self._batch_size))

    def _go_to(self, size: int) -> None:
        if size != self._size:
            self._size, self._num_here = size, 0
            self._narrower = dict.fromkeys(self._sizes, 0.0)

    def _best(self) -> int:
        fresh = self._num_passes - _STALE
        rates = {size: rate for size, rate in self._narrower.items() if size < self._size}
        for size, rate in self._rates.items():
            if self._last_seen[size] > fresh:
                rates[size] = rate
        wider = 2 * self._size
        if wider in self._sizes and self._size > 1:
            rates.setdefault(wider, rates[self._size] * _WIDER)
        rates[1] = 1.0  # without drafts
        return max(rates, key=lambda size: rates[size] / self._cost(size * self._batch_size))

    def _cost(self, rows: int) -> float:
        return 1.0 if rows == 1 else self._first + self._second * rows
