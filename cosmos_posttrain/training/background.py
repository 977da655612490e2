"""Jobs done one after the other on a thread, beside the loop.

Flows in: functions. Flows out: whether they are done, and what went wrong. A job must not use the
process groups that the loop uses. The thread ends with the process, whatever it is doing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class Background:
    """One thread and its queue. After a job that failed no further one is done.

    Attributes:
        problem: what the first failed job raised; None while all is well.
    """

    def __init__(self) -> None:
        self.problem: BaseException | None = None
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._num_left = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Adds a job; returns at once."""
        with self._changed:
            self._num_left += 1
        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if self.problem is None:
                    job()
            except BaseException as error:
                self.problem = error
            with self._changed:
                self._num_left -= 1
                self._changed.notify_all()

    @property
    def is_busy(self) -> bool:
        """True while a job is left."""
        return self._num_left > 0

    def join(self) -> None:
        """Waits until no job is left; raises nothing."""
        with self._changed:
            self._changed.wait_for(lambda: not self.is_busy)
