"""An average of the weights over the steps, beside the weights."""

from __future__ import annotations

from cosmos_posttrain.training.callbacks.base import Callback, Row, Run
from cosmos_posttrain.training.optimizer import CheckpointableOptimizer


class Ema(Callback):
    """``average = decay * average + (1 - decay) * weights`` after each step; saved with them.

    Args:
        decay: in [0, 1).
        optimizer: keeps the average, each rank of what it updates.
    """

    def __init__(self, decay: float, optimizer: CheckpointableOptimizer) -> None:
        self._decay, self._optimizer = decay, optimizer

    def after_step(self, run: Run, row: Row) -> None:
        self._optimizer.average(self._decay)
