"""The learning rates of a run: pure functions of the number of completed steps.

Flows in: the run's config, and Megatron's optimizer. Flows out: the rate and weight decay of each
parameter group at each step. The body (the layers) and the rows (token embedding, output layer) are
groups of their own where they differ.
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.optimizer_config import OptimizerConfig

# In a parameter group: whether the body's parameters are in it.
BODY = "is_body"


def min_lr(settings: OptimizerConfig) -> float:
    """The body's rate at the end of the decay."""
    return settings.lr / 10 if settings.min_lr is None else settings.min_lr


def row_rates(settings: OptimizerConfig) -> tuple[float, float] | None:
    """Peak and end of the rows' rate, of the same shape as the body's.

    None where rows and body never differ and may share their groups.
    """
    if settings.embedding_lr is None and not settings.freeze_body_steps:
        return None
    peak = settings.lr if settings.embedding_lr is None else settings.embedding_lr
    return peak, min_lr(settings) * peak / settings.lr


class Schedule:
    """Linear warm-up, then decay to ``min_lr`` at ``max_steps``; counted in optimizer steps.

    Megatron's schedule starts at 0; ours is one ahead, so that no step has a learning rate of 0.

    Args:
        config: the run's.
        optimizer: whose groups get their rates; a group with ``BODY`` false is one of rows.
    """

    def __init__(self, config: TrainConfig, optimizer: Any) -> None:
        settings = config.optimizer
        self._settings, self._optimizer = settings, optimizer
        warmup = settings.warmup_steps(config.max_steps)
        style = settings.lr_decay_style
        self._rates = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=min_lr(settings),
            lr_warmup_steps=warmup + 1,
            lr_decay_steps=config.max_steps + 1,
            lr_decay_style="WSD" if style == "wsd" else style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            wsd_decay_steps=settings.wsd_decay_steps(config.max_steps),
            lr_wsd_decay_style=settings.lr_wsd_decay_style,
        )
        self.step(increment=1)

    @property
    def body_is_frozen(self) -> bool:
        """Whether the next step trains embedding and output rows only."""
        return self._rates.num_steps <= self._settings.freeze_body_steps

    def step(self, increment: int) -> None:
        """Counts completed steps, and gives all groups the next step's rates."""
        self._rates.step(increment)
        if self.body_is_frozen:
            for group in self._optimizer.param_groups:
                if group.get(BODY, True):
                    group["lr"] = 0.0

    def rates(self) -> dict[str, float]:
        """The next step's rates as ``metrics.jsonl`` has them."""
        rates = {"lr": 0.0 if self.body_is_frozen else float(self._rates.get_lr({}))}
        rows = row_rates(self._settings)
        if rows is not None:
            peak, end = rows
            rates["embedding_lr"] = float(self._rates.get_lr({"max_lr": peak, "min_lr": end}))
        return rates
