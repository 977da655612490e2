"""The figures of the validation split at fixed steps."""

from __future__ import annotations

import math

from cosmos_posttrain.errors import NonFiniteLossError
from cosmos_posttrain.training.callbacks.base import Callback, Row, Run
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.validation import Validation


class Validate(Callback):
    """Validates every ``val_check_interval`` steps and after the last one."""

    def __init__(self, config: TrainConfig, validation: Validation) -> None:
        self._every = config.val_check_interval or config.save_every_n_steps
        self._validation = validation

    def after_step(self, run: Run, row: Row) -> None:
        is_due = run.completed_steps % self._every == 0 or run.is_last_step
        if not is_due or run.stop_reason is not None:  # who asks a run to end does not wait long
            return
        row |= self._validation.figures()
        loss = row["val_loss"]
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the validation loss is {loss} after step {row['step']}; nothing more is saved. "
                "Go on from an earlier checkpoint with a lower --lr."
            )
        run.record_validation(row)
