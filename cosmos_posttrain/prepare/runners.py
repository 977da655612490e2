"""Who runs the shard jobs: this process, or all processes of a launch, each a part of them.

Flows in: shard jobs; the launcher's environment (none under plain python). Flows out: finished
shards. Runners only schedule: what a job makes does not depend on who runs it, or beside what.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

from cosmos_posttrain import files, launch
from cosmos_posttrain.distributed import groups, meeting
from cosmos_posttrain.errors import CosmosPosttrainError, UserError, VideoError
from cosmos_posttrain.prepare.decoding import DecodingPool
from cosmos_posttrain.prepare.shard_job import ClipEncoder, ShardJob
from cosmos_posttrain.prepare.sources import VideoSource
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.video import Clip, decoder_name
from cosmos_posttrain.video.choice import VARIABLE, chosen

T = TypeVar("T")

# Ranks wait for the slowest one at the end, which may take as long as the whole job.
_PATIENCE = timedelta(days=30)


def run_jobs(jobs: Sequence[ShardJob], encoder: ClipEncoder, num_workers: int) -> None:
    """Runs jobs one after the other in this process, decoding ahead over their borders.

    Args:
        jobs: of one preparation.
        encoder: for all of them.
        num_workers: decoding threads.

    Raises:
        CosmosPosttrainError: the machine cannot read now.
    """
    if not jobs:
        return
    sources = [source for job in jobs for source in job.sources if job.refusal(source) is None]
    num_ranks = launch.world_size()
    label = f"process 1 of {num_ranks}" if num_ranks > 1 else ""
    progress = ProgressDisplay(len(sources), "videos", label)
    num_failed = 0
    with DecodingPool(sources, jobs[0].spec, num_workers, max(2, jobs[0].batch_size)) as pool:

        def read(source: VideoSource) -> Iterator[Clip]:
            nonlocal num_failed
            try:
                yield from pool.read(source)
            except VideoError:
                num_failed += 1
                raise
            finally:
                progress.advance(f"{num_failed} failed")

        for job in jobs:
            job.run(encoder, read)


def check_decoder(jobs: Sequence[ShardJob]) -> None:
    """Loads what decodes here, if there is something to decode, before any other work is done.

    Raises:
        UserError: it cannot be loaded, or is another library than the first process decodes with.
    """
    if not jobs:
        return
    if (name := decoder_name()) != jobs[0].decoder:
        raise UserError(
            f"this process (rank {launch.rank()}) decodes with {name}, the first one with "
            f"{jobs[0].decoder}: install the same on all machines, or set {VARIABLE} on all."
        )
    try:
        chosen()
    except UserError as error:
        raise UserError(f"this process (rank {launch.rank()}) cannot decode: {error}") from error


class PreparationRanks:
    """The processes of one preparation, and the few moments when all of them meet.

    Makes its own gloo group, so that no GPU is needed. A world that is not there yet is made too,
    and stays until the process ends: another one at the same address could meet the old one's end.
    """

    def __init__(self) -> None:
        self.rank = launch.rank()
        self.world_size = launch.world_size()
        self._group: Any = None
        if self.world_size > 1:
            if not torch.distributed.is_initialized():
                meeting.make_group("gloo", _PATIENCE)
                atexit.register(groups.shutdown)
            self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Rank 0 holds the folder against other preparations until the block ends.

        Raises:
            OutputFolderError: another process is writing there; on every rank.
        """
        with ExitStack() as stack:
            self.decide(lambda: stack.enter_context(files.locked(folder)))
            yield

    def decide(self, function: Callable[[], T], gather_first: bool = False) -> T:
        """Rank 0 calls ``function``; every rank gets its result, or raises its error.

        Args:
            function: called on rank 0 only; result and error must be picklable.
            gather_first: wait for every rank before calling.

        Raises:
            CosmosPosttrainError: another rank has ended.
        """
        if self.world_size == 1:
            return function()
        if gather_first:
            with _meeting():
                torch.distributed.barrier(self._group)
        answer = self._call(function)
        with _meeting():
            return groups.decide(lambda: self._unpack(answer), group=self._group)

    def deal(self, function: Callable[[], Sequence[T] | None]) -> list[T] | None:
        """Rank 0 calls ``function``; every rank gets its own part of the result, item by item.

        Args:
            function: called on rank 0 only; items and error must be picklable. None is for all.

        Raises:
            CosmosPosttrainError: another rank has ended.
        """
        if self.world_size == 1:
            items = function()
            return None if items is None else list(items)
        items, error = self._call(function)
        parts = [
            [None if items is None else list(items[rank :: self.world_size]), error]
            for rank in range(self.world_size)
        ]
        box: list[Any] = [None]
        with _meeting():
            torch.distributed.scatter_object_list(
                box, parts if self.rank == 0 else None, 0, self._group
            )
        part: list[T] | None = self._unpack(box[0])
        return part

    def _call(self, function: Callable[[], Any]) -> list[Any]:
        """[result, error] on rank 0; empty elsewhere."""
        if self.rank == 0:
            try:
                return [function(), None]
            except CosmosPosttrainError as error:
                return [None, error]
        return [None, None]

    @staticmethod
    def _unpack(box: list[Any]) -> Any:
        if box[1] is not None:
            raise box[1]
        return box[0]


@contextmanager
def _meeting() -> Iterator[None]:
    """One sentence where another rank is gone; gloo's own says nothing to a user."""
    try:
        yield
    except RuntimeError as error:
        raise CosmosPosttrainError(
            "another process of this preparation has ended; finished shards stay, so see why it "
            "did and give the same command again."
        ) from error
