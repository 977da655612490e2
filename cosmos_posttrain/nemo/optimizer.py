"""The direct engine's optimizer step in NeMo's hands.

Flows in: NeMo's request for an optimizer, and the loss of each step. Flows out: Megatron's
distributed optimizer as the direct engine builds it, whose step is the direct engine's too:
schedule, frozen body, clipping, and no update where something is not finite.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from torch import Tensor

from cosmos_posttrain.nemo.bases import McoreDistributedOptimizer, MegatronOptimizerModule
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.schedule import min_lr


class Update(Protocol):
    """What becomes of a step's gradients; ``training.trainer.Trainer.update`` is one."""

    def __call__(self, mean: Tensor, started: float, waited_seconds: float) -> dict[str, Any]:
        """Applies them; returns the step's row."""
        ...


class CosmosStep(McoreDistributedOptimizer):
    """NeMo's wrapper of Megatron's optimizer, with another step.

    Args:
        optimizer: Megatron's.
        update: applies the gradients.
        waited: how long the step has waited for its batch.
    """

    def __init__(self, optimizer: Any, update: Update, waited: Callable[[], float]) -> None:
        super().__init__(optimizer)
        self._update, self._waited = update, waited

    def step(self, closure: Callable[[], Any] | None = None) -> tuple[Any, float, None]:
        """Runs forward and backward passes (the closure) and updates; as NeMo's, loss and norm."""
        started = time.monotonic()
        assert closure is not None
        loss = closure()
        waited = self._waited()
        row = self._update(_on_all_stages(loss), started + waited, waited)
        return loss, row["grad_norm"], None


def _on_all_stages(loss: Any) -> Tensor:
    """The last pipeline stage's loss, float32; NeMo leaves others without it."""
    mean = torch.as_tensor(loss).detach().float().clone()
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            mean,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return mean


class CosmosOptimizer(MegatronOptimizerModule):
    """NeMo's optimizer module.

    Attributes:
        make: gets NeMo's model and gives the optimizer; None is NeMo's own way.
    """

    make: Callable[[Any], CosmosStep] | None = None

    def optimizers(self, model: Any) -> list[Any]:
        """This rank's optimizer."""
        if self.make is not None:
            return [self.make(model)]
        found: list[Any] = super().optimizers(model)
        for group in (group for optimizer in found for group in optimizer.param_groups):
            # NeMo renames them, and Megatron's schedule then decays norms too.
            group["wd_mult"] = group.get("pre_wd_mult", 1.0)
            group["lr_mult"] = group.get("pre_lr_mult", 1.0)
        return found


def optimizer_module(config: TrainConfig, dtype: torch.dtype) -> CosmosOptimizer:
    """AdamW with the run's settings.

    Args:
        config: the run's.
        dtype: of the parameters.
    """
    settings = config.optimizer
    names = ("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    return CosmosOptimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            min_lr=min_lr(settings),
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
            **{name: getattr(settings, name) for name in names},
        )
    )
