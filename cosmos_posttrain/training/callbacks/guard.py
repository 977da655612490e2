"""Ends a run whose numbers are no longer finite, before anything of it can be saved.

With ``skip_nonfinite`` a number of batches are left out first, each named.
"""

from __future__ import annotations

import math
from typing import Any

from cosmos_posttrain import launch
from cosmos_posttrain.errors import NonFiniteLossError
from cosmos_posttrain.training.callbacks.base import Callback, Row, Run
from cosmos_posttrain.training.config import TrainConfig

_NUMBERS = {"reduced_train_loss": "loss", "grad_norm": "norm of the gradient"}
_MAX_NAMED = 8  # in the line that is printed; the row has all


class Guard(Callback):
    """Looks at the loss and the gradient's norm, which are the same on all ranks.

    The step itself has made no update where one of them is not finite.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._allowed = config.skip_nonfinite
        self._num_skipped = 0

    @property
    def state(self) -> dict[str, Any]:
        return {"num_skipped": self._num_skipped} if self._num_skipped else {}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._num_skipped = state.get("num_skipped", 0)

    def after_step(self, run: Run, row: Row) -> None:
        bad = {key: row[key] for key in _NUMBERS if not math.isfinite(row[key])}
        if not bad:
            return
        key, value = next(iter(bad.items()))
        what = f"the {_NUMBERS[key]} is {value} at step {row['step']}"
        if self._num_skipped >= self._allowed:
            spent = f", after {self._num_skipped} skipped batches" if self._num_skipped else ""
            raise NonFiniteLossError(
                f"{what}{spent}; nothing of it was applied or saved. Give the same command with a "
                "lower --lr to go on from the last checkpoint, or a higher --skip_nonfinite to "
                "leave such batches out."
            )
        self._num_skipped += 1
        names = run.skip_batch(row)
        row |= dict.fromkeys(bad) | {"skipped_clips": names}
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        launch.say(
            f"{what}: batch {self._num_skipped} of at most {self._allowed} that are skipped, its "
            f"clips are {', '.join(names[:_MAX_NAMED])}{more}"
        )
