"""How much memory each stage of a run took at its peak.

Flows in: stages, as they begin and end. Flows out: bytes by stage: of a GPU what torch had
allocated there, else the process's own memory where the system (Linux) tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # see proc(5)


class Peaks:
    """Keeps the largest peak of each stage; a stage within another counts for both.

    Attributes:
        num_bytes: by stage, in the order in which they first ended.
    """

    def __init__(self) -> None:
        self.num_bytes: dict[str, int] = {}
        self._open: list[int] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures what happens in the block."""
        self._note()
        self._open.append(0)
        try:
            yield
        finally:
            self._note()
            peak = self._open.pop()
            if peak:
                self.num_bytes[name] = max(self.num_bytes.get(name, 0), peak)

    def _note(self) -> None:
        """Adds what was the peak since the last note to all open stages, and starts anew."""
        peak = peak_bytes()
        self._open = [max(value, peak) for value in self._open]
        _reset_peak()

    @property
    def text(self) -> str:
        """The peaks in words; "" where nothing is known."""
        where = "on the GPU" if torch.cuda.is_available() else "of the process"
        parts = [f"{name} {value / 1e9:.2f}" for name, value in self.num_bytes.items()]
        return f"peak memory {where}, GB: {', '.join(parts)}" if parts else ""


def peak_bytes() -> int:
    """Since the last reset; 0 where nobody tells."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, ValueError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return 0


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        _CLEAR.write_text(_RESET_PEAK)
