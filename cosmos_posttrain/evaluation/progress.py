"""How far an evaluation is.

Flows in: finished videos. Flows out: rate and time left, on standard error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LOG_SECONDS = 15.0


@contextmanager
def progress(total: int, num_done: int = 0) -> Iterator[Callable[[bool], None]]:
    """A live bar on a terminal, a line now and then in a log.

    Args:
        total: videos of the whole job.
        num_done: of which an earlier process has finished so many.

    Yields:
        To be called after each video with whether it was evaluated.
    """
    console = Console(stderr=True)
    start = last = time.monotonic()
    done, failed = num_done, 0
    rate = TextColumn("{task.fields[rate]:.2f} videos/s, {task.fields[failed]} failed, left:")
    columns = (BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("evaluate", total=total, completed=num_done, rate=0.0, failed=0)

        def advance(evaluated: bool) -> None:
            nonlocal last, done, failed
            done, failed = done + 1, failed + (not evaluated)
            now = time.monotonic()
            speed = (done - num_done) / max(now - start, 1e-9)
            bar.update(task, completed=done, rate=speed, failed=failed)
            if not console.is_terminal and (now - last > _LOG_SECONDS or done == total):
                last = now
                print(
                    f"{done}/{total} videos, {speed:.2f} videos/s, "
                    f"{(total - done) / speed:.0f} s left, {failed} failed",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance
