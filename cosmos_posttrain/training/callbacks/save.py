"""Checkpoints at fixed steps, at the last one, and where the run was asked to end."""

from __future__ import annotations

from pathlib import Path

from cosmos_posttrain import launch
from cosmos_posttrain.training.callbacks.base import Callback, Row, Run
from cosmos_posttrain.training.config import TrainConfig


class Save(Callback):
    """Saves every ``save_every_n_steps`` steps and at the end."""

    def __init__(self, config: TrainConfig) -> None:
        self._every = config.save_every_n_steps

    def after_step(self, run: Run, row: Row) -> None:
        run.poll_save()
        if run.is_last_step or run.completed_steps % self._every == 0:
            run.save(row)

    def after_save(self, run: Run, checkpoint: Path) -> None:
        launch.say(f"saved {checkpoint}")
