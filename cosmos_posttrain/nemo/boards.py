"""What a NeMo run logs: curves in TensorBoard and W&B, and NeMo's own log files.

Flows in: rows of numbers. Flows out: Lightning's loggers, fed with them beside ``metrics.jsonl``.
NeMo makes loggers and log files before it has a model; here they begin when all that a run needs
is there and its checkpoint is read, so that a run that cannot begin leaves nothing behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.dist import file_error
from cosmos_posttrain.nemo.bases import NeMoLogger, TensorBoardLogger
from cosmos_posttrain.runlog import say_tensorboard_ends, start_wandb
from cosmos_posttrain.training.callbacks.base import Row, Run
from cosmos_posttrain.training.callbacks.log import Log
from cosmos_posttrain.training.config import TrainConfig


class CosmosLogger(NeMoLogger):
    """NeMo's, which opens its log files later and makes no boards."""

    def _setup_file_logging(self, log_dir: Path) -> None:
        """Not yet: nothing is written before all fits."""

    def begin(self, folder: Path) -> None:
        """Opens NeMo's log files in an existing folder."""
        from nemo.utils import AppState

        AppState().log_dir = folder
        super()._setup_file_logging(folder)


class CosmosBoard(TensorBoardLogger):
    """Lightning's TensorBoard, whose curves a full disk ends, but not the run.

    Args:
        folder: ``LOG_DIR/default``.
        completed_steps: of the run so far; later points of the curves are dropped.
    """

    def __init__(self, folder: Path, completed_steps: int) -> None:
        super().__init__(str(folder), "tb_logs", version="", purge_step=completed_steps)
        self._is_off = False

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Adds a point to each curve."""
        self._show(lambda: super(CosmosBoard, self).log_metrics(metrics, step))

    def save(self) -> None:
        """Writes what is waiting."""
        self._show(super().save)

    def finalize(self, status: str) -> None:
        """Likewise, at the end."""
        self._show(lambda: super(CosmosBoard, self).finalize(status))

    def _show(self, write: Callable[[], object]) -> None:
        if self._is_off:
            return
        try:
            write()
        except Exception as error:  # Lightning says that a number is not supported
            said = file_error(error)
            if said is None:
                raise
            self._is_off = True
            say_tensorboard_ends(said)


class NemoLog(Log):
    """The direct engine's, whose boards are Lightning's loggers.

    Args:
        config: see ``Log``, as the next two.
        folder: see there.
        completed_steps: see there.
        trainer: Lightning's, which gets the loggers.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, completed_steps: int, trainer: Any
    ) -> None:
        super().__init__(config, folder, completed_steps, has_boards=False)
        self._trainer = trainer
        trainer.loggers = [CosmosBoard(folder, completed_steps)]
        found = start_wandb(config, folder) if launch.is_rank_zero() else None
        if found is not None:
            from lightning.pytorch.loggers import WandbLogger

            trainer.loggers.append(WandbLogger(experiment=found))

    def after_step(self, run: Run, row: Row) -> None:
        super().after_step(run, row)
        numbers = {
            key: value
            for key, value in row.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for logger in self._trainer.loggers:
            logger.log_metrics(numbers, step=row["step"])
