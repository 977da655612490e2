"""Ends a run whose numbers are no longer finite, before anything of it can be saved."""

from __future__ import annotations

import math

from cosmos_posttrain.errors import NonFiniteLossError
from cosmos_posttrain.training.callbacks.base import Callback, Row, Run


class Guard(Callback):
    """Looks at the loss and the gradient's norm, which are the same on all ranks.

    The step itself has made no update where one of them is not finite.
    """

    def after_step(self, run: Run, row: Row) -> None:
        for key, what in (("reduced_train_loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(row[key]):
                raise NonFiniteLossError(
                    f"the {what} is {row[key]} at step {row['step']}; nothing of it was applied or "
                    "saved. Give the same command with a lower --lr to go on from the last "
                    "checkpoint."
                )
