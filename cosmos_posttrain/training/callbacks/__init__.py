"""What happens around the steps of a run: one explicit list, walked in order after each step.

Flows in: the run and the row of numbers of its last step. Flows out: the same row, with what a
callback adds; checkpoints, log lines, an end. New behaviour is an item of ``make_callbacks``, never
a branch in the loop.
"""

from __future__ import annotations

from cosmos_posttrain.training.callbacks.base import Callback
from cosmos_posttrain.training.callbacks.ema import Ema
from cosmos_posttrain.training.callbacks.guard import Guard
from cosmos_posttrain.training.callbacks.log import Log
from cosmos_posttrain.training.callbacks.profile import Profile
from cosmos_posttrain.training.callbacks.samples import Samples
from cosmos_posttrain.training.callbacks.save import Save
from cosmos_posttrain.training.callbacks.signals import Signals
from cosmos_posttrain.training.callbacks.validate import Validate
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.optimizer import CheckpointableOptimizer
from cosmos_posttrain.training.validation import Validation

__all__ = ["Callback", "make_callbacks"]


def make_callbacks(
    config: TrainConfig,
    optimizer: CheckpointableOptimizer,
    validation: Validation | None,
    samples: Samples | None,
    log: Log,
) -> list[Callback]:
    """The callbacks of a run, in their order.

    Saving comes before validating, so that steps are safe as soon as they can be.
    """
    callbacks: list[Callback] = [Guard(config)]
    if config.optimizer.ema_decay is not None:
        callbacks.append(Ema(config.optimizer.ema_decay, optimizer))
    callbacks += [Signals(), Save(config)]
    if validation is not None:
        callbacks.append(Validate(config, validation))
    if samples is not None:
        callbacks.append(samples)
    callbacks.append(log)
    if config.profile_steps is not None:
        callbacks.append(Profile(config.profile_steps, log.folder, log.first_step))
    return callbacks
