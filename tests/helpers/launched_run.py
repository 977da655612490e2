"""A real run under torchrun whose processes a test kills or stops.

Flows in: a script's command line. Flows out: its launcher and workers, to be signalled, and what
they said at the end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from helpers.distributed_run import REPOSITORY_DIR, kill_tree


class LaunchedRun:
    """A run under torchrun; use as a context manager, so that nothing outlives the test.

    Args:
        argv: the script (in the repository, or any path) and its arguments.
        log_dir: its run folder.
        options: of torchrun.
    """

    def __init__(self, argv: Sequence[str | Path], log_dir: Path, *options: str) -> None:
        self.metrics = log_dir / "default" / "metrics.jsonl"
        self._output = log_dir.with_name(f"{log_dir.name}-{time.monotonic_ns()}.txt")
        script, *rest = map(str, argv)
        command = [sys.executable, "-m", "torch.distributed.run", *options]
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [*command, str(REPOSITORY_DIR / script), *rest],
                cwd=REPOSITORY_DIR,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> LaunchedRun:
        return self

    def __exit__(self, *error: object) -> None:
        kill_tree(self.process.pid)
        self.process.wait()

    @property
    def output(self) -> str:
        """What all processes have said so far."""
        return self._output.read_text()

    def workers(self) -> dict[int, psutil.Process]:
        """The processes by rank that live now."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            for worker in psutil.Process(self.process.pid).children():
                with contextlib.suppress(psutil.Error):
                    rank = worker.environ().get("RANK")  # none between fork and exec
                    if rank is not None and worker.status() != psutil.STATUS_ZOMBIE:
                        found[int(rank)] = worker
        return found

    def num_rows(self) -> int:
        """Steps in metrics.jsonl."""
        return len(self.metrics.read_text().splitlines()) if self.metrics.is_file() else 0

    def wait_for_steps(self, number: int, timeout_seconds: float = 600) -> None:
        """Waits until so many steps are recorded."""
        deadline = time.monotonic() + timeout_seconds
        while self.num_rows() < number:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def signal(self, rank: int, number: signal.Signals) -> int:
        """Sends a signal to a worker; returns its process id."""
        worker = self.workers()[rank]
        worker.send_signal(number)
        return worker.pid

    def wait(self, timeout_seconds: float) -> int:
        """Waits for the end; returns the exit code."""
        return self.process.wait(timeout=timeout_seconds)
