"""The most memory that a piece of code holds beyond what the process held before. Linux only."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


class Peak:
    """The result of ``peak_memory``.

    Attributes:
        num_bytes: resident memory above that at the start; helper processes count with what they
            do not share with this one.
    """

    num_bytes = 0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Watches this process (exactly, by the kernel's own mark) and its children (100 times a s)."""
    peak, stopped = Peak(), threading.Event()
    of_children = 0

    def watch() -> None:
        nonlocal of_children
        while not stopped.wait(0.01):
            of_children = max(of_children, _of_children())

    watcher = threading.Thread(target=watch)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present
    before = _status("VmRSS")
    watcher.start()
    try:
        yield peak
    finally:
        stopped.set()
        watcher.join()
        peak.num_bytes = _status("VmHWM") - before + of_children


def _of_children() -> int:
    total = 0
    for child in psutil.Process(os.getpid()).children(recursive=True):
        try:
            total += child.memory_full_info().uss
        except psutil.Error:
            pass
    return total


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
