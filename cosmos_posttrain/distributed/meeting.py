"""The store at which the processes of one start meet, empty whatever earlier starts left there.

Flows in: the launcher's environment. Flows out: a store, this process's rank, their number, or the
process group that they make there.

torchrun keeps one store through all restarts of a run, so a process that is quicker than the others
would read the addresses that killed ones left, and connect to nobody. So the processes first agree
on a word of this start, in front of all keys. Rank 0 asks with a random word; each other rank
answers the word that it finds with one of its own, and again when the word changes. Rank 0 closes
with all answers to its word, and a rank that finds its own answer among them knows that the word is
of now: nobody but the living could have repeated it.
"""

from __future__ import annotations

import json
import secrets
import time
from datetime import timedelta
from typing import Any

import torch.distributed

from cosmos_posttrain.errors import RankError

_PERIOD_SECONDS = 0.02
# All processes of a start are started together, however long they will wait for one another later.
_LONGEST = timedelta(hours=1)


def make_group(backend: str, timeout: timedelta, **options: Any) -> None:
    """Makes torch's process group of all processes of this start.

    Args:
        backend: gloo, nccl, or both.
        timeout: how long a collective may take.
        **options: of torch's ``init_process_group``.

    Raises:
        RankError: some processes did not come in time.
    """
    store, rank, world_size = meet(min(timeout, _LONGEST))
    torch.distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=timeout, **options
    )


def meet(timeout: timedelta) -> tuple[Any, int, int]:
    """The store of this start, this process's rank and their number.

    Args:
        timeout: how long to wait for the others.

    Raises:
        RankError: some did not come in time.
    """
    store, rank, world_size = next(iter(torch.distributed.rendezvous("env://", timeout=timeout)))
    end = time.monotonic() + timeout.total_seconds()
    word = _ask(store, world_size, end) if rank == 0 else _answer(store, rank, end)
    return torch.distributed.PrefixStore(f"start-{word}", store), rank, world_size


def _ask(store: Any, world_size: int, end: float) -> str:
    word = secrets.token_hex(8)
    store.set("word", word)
    answers = [f"answer/{word}/{rank}" for rank in range(1, world_size)]
    missing = answers
    while missing:
        missing = [key for key in missing if not store.check([key])]
        _pause(end, f"{len(missing)} of {world_size} processes")
    store.set(f"met/{word}", json.dumps([store.get(key).decode() for key in answers]))
    return word


def _answer(store: Any, rank: int, end: float) -> str:
    own, answered = secrets.token_hex(8), ""
    while True:
        word = store.get("word").decode() if store.check(["word"]) else ""
        if word != answered:
            store.set(f"answer/{word}/{rank}", own)
            answered = word
        met = f"met/{word}"
        if word and store.check([met]) and own in json.loads(store.get(met)):
            return str(word)
        _pause(end, "rank 0")


def _pause(end: float, missing: str) -> None:
    if time.monotonic() > end:
        raise RankError(
            f"{missing} did not come to the meeting of the processes in time; see what their "
            "machines say, then give the same command again."
        )
    time.sleep(_PERIOD_SECONDS)
