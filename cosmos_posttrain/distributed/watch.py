"""Names the rank that a job waits for: one that is gone, or one that does not get on.

Flows in: where the loop of this rank is, told by ``at``, which sends nothing. Flows out: a
sentence, the same on all ranks, and the end of the process. A thread tells the store at which the
processes met where this rank is, and looks every second

    whether a rank on this machine has ended           all ranks
    whether another rank has found something           all ranks
    whether a rank on another machine has fallen silent, or the loop has stood still too long: ranks
        0 and 1, who read what all ranks tell

so that nothing is sent for each step and no GPU is waited for.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed

from cosmos_posttrain import launch
from cosmos_posttrain.distributed import peers
from cosmos_posttrain.errors import RankError

_PERIOD_SECONDS = 1.0
# Ranks of another machine that tell nothing for so long are gone with it.
_SILENCE_SECONDS = 180.0
# How long an error of the loop waits for the reason, and a reason for the loop to end by itself.
_PATIENCE_SECONDS = 10.0
_GRACE_SECONDS = 20.0
_JUDGES = (0, 1)
_COLLECTIVES = f"torch{os.sep}distributed{os.sep}"
_FIX = "the run ends here, and the same command goes on from the last checkpoint."


# Of a rank whose thread has never told anything.
_NOTHING: dict[str, Any] = {
    "count": -1,
    "place": "at its start",
    "code": "unknown code",
    "waits": False,
}


class RankWatch:
    """Watches the other ranks from a thread; in a world of one it does nothing. All ranks make one.

    Args:
        timeout_minutes: how long the loop may stand still at one place.
    """

    def __init__(self, timeout_minutes: float) -> None:
        self._timeout = 60 * timeout_minutes
        self._place, self._count, self._since = "at its start", 0, time.monotonic()
        self._num_looks = 0
        self._verdict: str | None = None
        self._found, self._taken, self._closed = (threading.Event() for _ in range(3))
        self._heard: dict[int, tuple[Any, float]] = {}  # for the judges
        self._store: Any = None
        if torch.distributed.get_world_size() == 1:
            return
        self._rank = torch.distributed.get_rank()
        self._peers, self._word = peers.meet(self._rank)
        self._main = threading.get_ident()
        self._store = launch.launcher_store(_PATIENCE_SECONDS)
        if self._store is not None:
            threading.Thread(target=self._work, name="watch", daemon=True).start()

    def at(self, place: str) -> None:
        """The loop goes on to another place; all ranks pass the same places in the same order."""
        self._place, self._since = place, time.monotonic()
        self._count += 1

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Inside, an error of a broken connection becomes a sentence about the rank that is gone.

        Raises:
            RankError: instead of any RuntimeError, where a rank is gone or stuck.
        """
        try:
            yield
        except RuntimeError as error:
            if self._store is None or not self._found.wait(_PATIENCE_SECONDS):
                raise
            self._taken.set()
            raise RankError(str(self._verdict)) from error

    def close(self, finished: bool = False) -> None:
        """Ends the watch; safe to call twice.

        Args:
            finished: this rank has come to the end, and may be gone when others look.
        """
        if self._store is not None and finished and not self._closed.is_set():
            with contextlib.suppress(RuntimeError):
                self._store.set(self._key("finished", self._rank), "1")
        self._closed.set()

    def _key(self, *words: object) -> str:
        return "/".join(["cosmos_posttrain", self._word, *map(str, words)])

    def _work(self) -> None:
        reached = time.monotonic()
        while not self._closed.wait(_PERIOD_SECONDS):
            try:
                verdict = self._look()
                reached = time.monotonic()
            except RuntimeError as error:  # the store does not answer
                verdict = self._dead_neighbour()
                if verdict is None and time.monotonic() - reached > _SILENCE_SECONDS:
                    verdict = f"the store at which the ranks met does not answer ({error})."
            if verdict is not None and not self._closed.is_set():
                self._end(verdict)
                return

    def _look(self) -> str | None:
        """One round; returns what is wrong, in the words of the rank that found it first."""
        self._num_looks += 1
        self._store.set(self._key("at", self._rank), json.dumps(self._report()))
        if self._store.check([self._key("verdict")]):
            return str(self._store.get(self._key("verdict")).decode())
        verdict = self._dead_neighbour()
        stood = time.monotonic() - self._since
        if verdict is None and self._rank in _JUDGES:
            reports = self._listen()
            verdict = self._silent_machine() or (
                self._stuck(reports) if stood > self._timeout else None
            )
        if verdict is None and stood > self._timeout + _SILENCE_SECONDS:
            verdict = f"the run stands still {self._place}, and ranks 0 and 1 do not say why."
        if verdict is None:
            return None
        return str(self._store.compare_set(self._key("verdict"), "", verdict).decode())

    def _report(self) -> dict[str, Any]:
        code, waits = _code_of(sys._current_frames().get(self._main))
        where = {"count": self._count, "place": self._place, "code": code, "waits": waits}
        return {"look": self._num_looks, **where}

    def _dead_neighbour(self) -> str | None:
        """A rank on this machine that has ended before its time."""
        own = self._peers[self._rank]
        for peer in self._peers:
            if peer.namespace != own.namespace or peer is own or not peer.is_dead():
                continue
            with contextlib.suppress(RuntimeError):
                if self._store.check([self._key("finished", peer.rank)]):
                    continue
            return f"{peer} has ended before the others: it was killed, or says itself why; {_FIX}"
        return None

    def _listen(self) -> dict[int, dict[str, Any]]:
        """What each rank tells, and when it last told something new."""
        reports = {}
        for peer in self._peers:
            key = self._key("at", peer.rank)
            report = json.loads(self._store.get(key)) if self._store.check([key]) else {}
            reports[peer.rank] = report
            # Who has told nothing at all has been silent since this rank began to listen.
            if self._heard.get(peer.rank, ("", 0.0))[0] != report.get("look"):
                self._heard[peer.rank] = report.get("look"), time.monotonic()
        return reports

    def _silence(self, rank: int) -> float:
        """Seconds since a rank last told something."""
        return time.monotonic() - self._heard[rank][1]

    def _silent_machine(self) -> str | None:
        own = self._peers[self._rank].namespace
        for peer in self._peers:
            if peer.namespace != own and self._silence(peer.rank) > _SILENCE_SECONDS:
                if self._store.check([self._key("finished", peer.rank)]):
                    continue
                return (
                    f"{peer} has not been heard of for {_SILENCE_SECONDS:.0f} seconds: its machine "
                    f"or its network is gone; {_FIX}"
                )
        return None

    def _stuck(self, reports: dict[int, dict[str, Any]]) -> str:
        """A sentence about the ranks that the others wait for."""
        known = {rank: report or _NOTHING for rank, report in reports.items()}
        first = min(report["count"] for report in known.values())
        behind = {rank for rank, report in known.items() if report["count"] == first}
        stopped = {rank for rank in reports if self._silence(rank) > _PATIENCE_SECONDS}
        busy = {rank for rank, report in known.items() if not report["waits"]}
        suspects = behind
        for narrower in (stopped, busy):
            suspects = suspects & narrower or suspects
        minutes = f"{self._timeout / 60:g} minutes (--distributed_timeout_minutes)"
        if len(suspects) == len(reports):
            report = known[min(suspects)]
            return (
                f"all ranks have stood still for {minutes} {report['place']}, rank "
                f"{min(suspects)} in {report['code']}; {_FIX}"
            )
        one = min(suspects)
        report, other = known[one], known[min(reports.keys() - suspects)]
        also = f" (and {len(suspects) - 1} more)" if len(suspects) > 1 else ""
        how = "was stopped" if one in stopped else "is stuck"
        return (
            f"{self._peers[one]}{also} {how} {report['place']}, in {report['code']}; the others "
            f"have waited for {minutes} {other['place']}, in {other['code']}; {_FIX}"
        )

    def _end(self, verdict: str) -> None:
        """Lets the loop end the process, where it notices that something is wrong, or ends it."""
        self._verdict = verdict
        self._found.set()
        if self._taken.wait(_PATIENCE_SECONDS / 2):
            time.sleep(_GRACE_SECONDS)  # the process is over before
        else:
            launch.print_once(verdict)
        os._exit(RankError.exit_code)


def _code_of(frame: Any) -> tuple[str, bool]:
    """The innermost line of a stack, and whether it waits there for other ranks."""
    if frame is None:
        return "unknown code", False
    where = f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"
    waits = False
    while frame is not None and not waits:
        waits = _COLLECTIVES in frame.f_code.co_filename
        frame = frame.f_back
    return where, waits
