"""Who waits for a clip, in order.

Flows in: ``ClipJob``s from the addresses (the event loop's thread). Flows out: the first of them,
with those behind it that may be generated together, to the worker's thread; to each client, lines
that say what becomes of its clip.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.serve.metrics import Metrics
from cosmos_posttrain.serve.reading import Found
from cosmos_posttrain.serve.settings import ClipSettings


class QueueFullError(CosmosPosttrainError):
    """There is no place for another clip."""


@dataclass(eq=False)
class ClipJob:
    """A clip that somebody waits for.

    Attributes:
        name: what it is asked for by; nobody guesses it.
        file: name of the upload.
        folder: of its files.
        settings: of the sampling.
        found: what the upload is.
        loop: the event loop that its lines go to.
        number: how many were let in before it.
        state: waiting, running, or one of ``metrics.ENDS``.
        summary: what came of it, for clients that ask later.
        wants_end: nobody wants it any more.
    """

    name: str
    file: str
    folder: Path
    settings: ClipSettings
    found: Found
    loop: asyncio.AbstractEventLoop
    number: int = 0
    state: str = "waiting"
    summary: dict[str, Any] = field(default_factory=dict)
    wants_end: bool = False
    lines: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)

    @property
    def kind(self) -> Hashable:
        """Jobs of one kind can be generated together."""
        own = self.settings
        return self.found.num_given, own.temperature, own.top_p, own.top_k, own.guidance_scale

    def say(self, event: str, **values: Any) -> None:
        """Sends the client a line of JSON; from any thread."""
        self._send((json.dumps({"event": event, **values}) + "\n").encode())

    def end(self, state: str, **values: Any) -> None:
        """Sends the last line; nothing is kept but of clips that are done."""
        if state != "done":
            shutil.rmtree(self.folder, ignore_errors=True)
        self.state = state
        self.summary = {"state": state, **values}
        self.say(state, **values)
        self._send(None)

    def _send(self, line: bytes | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the service has ended
            self.loop.call_soon_threadsafe(self.lines.put_nowait, line)


class JobQueue:
    """A bounded queue; places are taken before anything is uploaded.

    Args:
        size: clips that may wait, those included that are being uploaded.
        metrics: counts those that are cancelled here.
    """

    def __init__(self, size: int, metrics: Metrics) -> None:
        self._size, self._metrics = size, metrics
        self._waiting: list[ClipJob] = []
        self._running: list[ClipJob] = []
        self._num_places = 0
        self._num_jobs = 0
        self._is_open = True
        self._changed = threading.Condition()

    @property
    def counts(self) -> tuple[int, int]:
        """Clips that wait (those being uploaded included), and clips that are generated."""
        with self._changed:
            return self._num_places, len(self._running)

    def take_place(self) -> None:
        """Holds a place, which ``put`` uses and ``give_back`` frees.

        Raises:
            QueueFullError: there is none.
        """
        with self._changed:
            if not self._is_open:
                raise QueueFullError("the service is ending; come back when it runs again.")
            if self._num_places >= self._size:
                raise QueueFullError(
                    f"the queue is full: {self._size} clips wait already; try again in a while."
                )
            self._num_places += 1

    def give_back(self) -> None:
        """Frees a place that was not used."""
        with self._changed:
            self._num_places -= 1

    def put(self, job: ClipJob) -> None:
        """Lets a job wait, last of all, at the place that was held for it."""
        with self._changed:
            self._num_jobs += 1
            job.number = self._num_jobs
            job.say("accepted", name=job.name, number=job.number, num_given=job.found.num_given)
            if not self._is_open:
                self._num_places -= 1
                self._end(job, "the service is ending.")
                return
            self._waiting.append(job)
            self._tell_places()
            self._changed.notify()

    def take(self, max_jobs: int, timeout_seconds: float) -> list[ClipJob] | None:
        """The first job and those of its kind behind it, in order; empty when time is over.

        Returns:
            None when the queue is closed.
        """
        with self._changed:
            self._running = []
            self._changed.wait_for(lambda: self._waiting or not self._is_open, timeout_seconds)
            if not self._is_open:
                return None
            if not self._waiting:
                return []
            kind = self._waiting[0].kind
            alike = itertools.takewhile(lambda job: job.kind == kind, self._waiting)
            taken = list(itertools.islice(alike, max_jobs))  # nobody overtakes anybody
            self._waiting = self._waiting[len(taken) :]
            self._running = taken
            self._num_places -= len(taken)
            for job in taken:
                job.state = "running"
            self._tell_places()
            return taken

    def cancel(self, job: ClipJob, also_running: bool = False) -> None:
        """Ends a job that waits; one that is generated is asked to end, where that is wanted."""
        with self._changed:
            job.wants_end |= also_running
            if job in self._waiting:
                self._waiting.remove(job)
                self._num_places -= 1
                self._end(job, "it was cancelled.")
                self._tell_places()

    def close(self) -> None:
        """Ends all that waits, and asks what is generated to end."""
        with self._changed:
            self._is_open = False
            for job in self._waiting:
                self._end(job, "the service is ending.")
            self._num_places -= len(self._waiting)
            self._waiting = []
            for job in self._running:
                job.wants_end = True
            self._changed.notify_all()

    def _end(self, job: ClipJob, problem: str) -> None:
        self._metrics.count_job("cancelled")
        job.end("cancelled", problem=problem)

    def _tell_places(self) -> None:
        for place, job in enumerate(self._waiting):
            job.say("waiting", ahead=place + len(self._running))
