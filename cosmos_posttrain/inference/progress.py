"""The line that says how far a long generation is.

Flows in: counts of finished tokens. Flows out: tokens/s and the time left, on standard error, from
the one process that speaks.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class ProgressLine:
    """Rewrites one line in a terminal; in a log file writes a new one now and then."""

    def __init__(self, total: int, label: str, stream: TextIO | None = None) -> None:
        self._total = total
        self._label = label
        self._stream = stream or sys.stderr
        self._is_terminal = self._stream.isatty()
        self._pause_seconds = 0.25 if self._is_terminal else 15.0
        self._start = self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        """Shows ``done`` of the total, if the last line is old enough or this is the end."""
        now = time.monotonic()
        if now - self._last < self._pause_seconds and done < self._total:
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        left = _minutes((self._total - done) / rate)
        line = f"{self._label}: {done}/{self._total} tokens, {rate:.1f} tokens/s, " + (
            f"{left} left" if done < self._total else f"{_minutes(now - self._start)} in all"
        )
        if not self._is_terminal:
            line += "\n"
        elif done < self._total:
            line = f"\r{line}\x1b[K"
        else:
            line = f"\r{line}\x1b[K\n"
        self._stream.write(line)
        self._stream.flush()
