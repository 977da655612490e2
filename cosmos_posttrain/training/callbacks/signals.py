"""SIGTERM and SIGUSR1 end a run after its next save."""

from __future__ import annotations

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.launch import StopSignal
from cosmos_posttrain.training.callbacks.base import Callback, Row, Run


class Signals(Callback):
    """Asks all ranks after each step whether one of them was told to end.

    If a rank is gone, asking fails and the run ends without a save: a checkpoint that only some
    ranks write is none.
    """

    def __init__(self) -> None:
        self._signal = StopSignal()

    def after_step(self, run: Run, row: Row) -> None:
        if groups.any_rank(int(self._signal.requested is not None)):
            run.stop_reason = self._signal.requested or "a signal to another process"

    def close(self) -> None:
        self._signal.close()
