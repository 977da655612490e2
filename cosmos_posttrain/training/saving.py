"""When a checkpoint is written: at once, or on a thread beside the loop.

Flows in: the run's model and optimizer at a step. Flows out: a checkpoint in the run folder.

    wait for the one before -> copy into host memory -> the loop goes on
                                                     -> thread: write, index, rename, prune

What is written is the copy, by the same code. The ranks' threads talk to one another over a process
group of their own, so that they meet nobody else's messages. At most one is being written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import dist
from cosmos_posttrain.checkpoint.host_copy import HostCopy
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import SaveError
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.chunks import ModelChunks
from cosmos_posttrain.training.background import Background
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.optimizer import CheckpointableOptimizer
from cosmos_posttrain.training.run_folder import Record, RunFolder


class Saver:
    """Writes the checkpoints of a run; every rank has one and calls it at the same steps.

    Args:
        config: the run's.
        folder: where they go.
        model: this rank's part.
        optimizer: this rank's part.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        model: CosmosGPTModel | ModelChunks,
        optimizer: CheckpointableOptimizer,
    ) -> None:
        self._config, self._folder = config, folder
        self._model, self._optimizer = model, optimizer
        self.num_bytes = dist.num_bytes(model, optimizer)
        self._pending: Path | None = None
        self._background: Background | None = None
        self._group: Any = None
        self._copy: HostCopy | None = None
        if config.async_save:
            self._background = Background()
            self._group = groups.side_group()

    def prepare(self) -> None:
        """Allocates what a save needs, so that none of the steps waits for it."""
        if self._background is not None:
            self._copy = HostCopy(dist.own_part(self._model, self._optimizer).pieces)

    def save(self, name: str, state: dict[str, Any], row: dict[str, Any]) -> Path:
        """Writes a checkpoint, or begins to; returns its path.

        Args:
            name: of its folder.
            state: how far the run is, and what callbacks keep.
            row: of the last step.

        Raises:
            SaveError: on every rank: there is no room, writing failed, or that of the one before.
        """
        assert self._pending is None
        temporary = self._folder.make_room(name, self.num_bytes)
        part = dist.own_part(self._model, self._optimizer)
        if self._background is not None:
            assert self._copy is not None
            part = dist.RankPart(self._copy.take(part.pieces), copy.deepcopy(part.common))
        # The loop goes on changing its own.
        record = Record(self._model.model_config, copy.deepcopy(state), dict(row))
        target = self._pending = self._folder.checkpoints / name
        self._do(lambda: self._folder.write(self._config, temporary, part, record, self._group))
        return target

    def record_validation(self, checkpoint: Path, row: dict[str, Any]) -> None:
        """Adds a validation to a checkpoint, as soon as that is there."""
        if self._pending is None or self._background is None:
            groups.decide(lambda: self._folder.record_validation(self._config, checkpoint, row))
        elif launch.is_rank_zero():
            later = dict(row)
            self._do(lambda: self._folder.record_validation(self._config, checkpoint, later))

    def _do(self, job: Callable[[], object]) -> None:
        if self._background is None:
            job()
        else:
            self._background.submit(job)

    def is_settled(self) -> bool:
        """Whether a checkpoint that was begun is complete, or has failed; the same on all ranks.

        The ranks ask one another only while there is one.
        """
        if self._pending is None:
            return False
        background = self._background
        if background is None:
            return True
        failed, busy = background.problem is not None, background.is_busy
        return groups.any_rank(2 if failed else int(busy)) != 1

    def wait(self) -> Path | None:
        """Waits for the checkpoint that was begun; returns it, or None where there is none.

        Raises:
            SaveError: on every rank, if any of them could not write its part.
        """
        checkpoint, self._pending = self._pending, None
        if checkpoint is None or self._background is None:
            return checkpoint
        self._background.join()
        problem = self._background.problem
        if not groups.any_rank(int(problem is not None)):
            return checkpoint
        if isinstance(problem, SaveError):
            raise problem
        raise SaveError(
            f"{checkpoint} was not written{f' ({problem!r})' if problem else ''}; the same command "
            "goes on from the checkpoint before."
        ) from problem

    def close(self) -> None:
        """Lets what was begun be written, and gives its memory back; raises nothing."""
        if self._background is not None:
            self._background.join()
        if self._copy is not None:
            self._copy.close()
            self._copy = None
