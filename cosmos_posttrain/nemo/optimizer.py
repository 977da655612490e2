"""The direct engine's optimizer and schedule, as NeMo asks for them.

Flows in: a ``TrainConfig``. Flows out: a ``MegatronOptimizerModule`` whose learning rates and
weight decay are those of ``training/schedule.py`` at every step.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from cosmos_posttrain.nemo.bases import LRSchedulerModule, MegatronOptimizerModule
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.schedule import Schedule, min_lr


class _Steps(torch.optim.lr_scheduler.LRScheduler):
    """Our schedule in the form of torch's."""

    def __init__(self, optimizer: Any, schedule: Schedule) -> None:
        self.optimizer, self._schedule = optimizer, schedule

    def step(self, epoch: int | None = None) -> None:
        self._schedule.step(increment=1)


class CosmosSchedule(LRSchedulerModule):
    """Warm-up and decay, counted in optimizer steps.

    Args:
        config: the run's.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.run = config

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        """What Lightning asks for."""
        steps = _Steps(optimizer, Schedule(self.run, optimizer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}


class CosmosOptimizer(MegatronOptimizerModule):
    """NeMo's, with the multipliers by the names that Megatron's schedule reads."""

    def optimizers(self, model: Any) -> list[Any]:
        """Megatron's distributed optimizer of this rank."""
        found: list[Any] = super().optimizers(model)
        for group in (group for optimizer in found for group in optimizer.param_groups):
            group["wd_mult"] = group.get("pre_wd_mult", 1.0)
            group["lr_mult"] = group.get("pre_lr_mult", 1.0)
        return found


def make_optimizer(config: TrainConfig, dtype: torch.dtype) -> CosmosOptimizer:
    """AdamW with the run's settings.

    Args:
        config: the run's.
        dtype: of the parameters.
    """
    settings = config.optimizer
    names = ("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    megatron = MegatronOptimizerConfig(
        optimizer="adam",
        min_lr=min_lr(settings),
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
        **{name: getattr(settings, name) for name in names},
    )
    return CosmosOptimizer(megatron, lr_scheduler=CosmosSchedule(config))
