"""How a run's weights are updated: rates, decay, gradients, where the optimizer lies. No torch.

Flows in: a run's settings. Flows out: what is wrong with them, in words.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag
from cosmos_posttrain.config import setting

LR_DECAY_STYLES = ("cosine", "linear", "constant", "wsd")
WSD_DECAY_STYLES = ("minus_sqrt", "linear", "cosine", "exponential")


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and decay.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the end; None means a tenth of ``lr``.
        lr_warmup_steps: linear warm-up; None means a twentieth of the steps.
        lr_decay_style: ``cosine``, ``linear``, ``constant``, or ``wsd``: constant, and a decay
            over the last ``lr_wsd_decay_steps``.
        lr_wsd_decay_steps: steps of ``wsd``'s decay; None means a tenth of all.
        lr_wsd_decay_style: the decay of ``wsd``: ``minus_sqrt``, ``linear``, ``cosine`` or
            ``exponential``.
        embedding_lr: peak learning rate of token embedding and output rows; None means ``lr``.
        freeze_body_steps: first steps that train token embedding and output rows only.
        ema_decay: share of the weights' average that stays at each step; None keeps no average.
        weight_decay: decoupled; of matrices (embedding, output rows and LoRA's factors among them),
            not of norms.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        clip_grad: largest norm of the whole gradient; 0 means no clipping.
        grad_reduce_in_bf16: keep and sum gradients in bfloat16, not float32: half the memory and
            half of what data parallelism sends, for a model in bfloat16.
        cpu_offload: keep the optimizer's float32 weights and moments in host memory and update them
            on the CPU.
        offload_fraction: share of the optimizer that ``cpu_offload`` takes; None means all of it.
    """

    lr: float = setting(5e-5, above=0)
    min_lr: float | None = setting(None, at_least=0)
    lr_warmup_steps: int | None = setting(None, at_least=0)
    lr_decay_style: str = setting("cosine", choices=LR_DECAY_STYLES)
    lr_wsd_decay_steps: int | None = setting(None, at_least=1)
    lr_wsd_decay_style: str = setting("minus_sqrt", choices=WSD_DECAY_STYLES)
    embedding_lr: float | None = setting(None, above=0)
    freeze_body_steps: int = setting(0, at_least=0)
    ema_decay: float | None = setting(None, at_least=0, below=1)
    weight_decay: float = setting(0.1, at_least=0)
    adam_beta1: float = setting(0.9, at_least=0, below=1)
    adam_beta2: float = setting(0.95, at_least=0, below=1)
    adam_eps: float = setting(1e-8, above=0)
    clip_grad: float = setting(1.0, at_least=0)
    grad_reduce_in_bf16: bool = False
    cpu_offload: bool = False
    offload_fraction: float | None = setting(None, above=0, at_most=1)

    @property
    def offloaded_share(self) -> float:
        """Share of the optimizer that lies in host memory."""
        return (self.offload_fraction or 1.0) if self.cpu_offload else 0.0

    def warmup_steps(self, max_steps: int) -> int:
        """Steps of the warm-up, given all of the run's."""
        given = self.lr_warmup_steps
        return max_steps // 20 if given is None else given

    def wsd_decay_steps(self, max_steps: int) -> int:
        """Steps of ``wsd``'s decay, given all of the run's."""
        given = self.lr_wsd_decay_steps
        return max(max_steps // 10, 1) if given is None else given


OPTIMIZER_FLAGS = (
    Flag("--lr", "optimizer.lr"),
    Flag("--min_lr", "optimizer.min_lr"),
    Flag("--lr_warmup_steps", "optimizer.lr_warmup_steps"),
    Flag("--lr_decay_style", "optimizer.lr_decay_style", aliases=("--lr_scheduler",)),
    Flag("--lr_wsd_decay_steps", "optimizer.lr_wsd_decay_steps"),
    Flag("--lr_wsd_decay_style", "optimizer.lr_wsd_decay_style"),
    Flag("--embedding_lr", "optimizer.embedding_lr"),
    Flag("--freeze_body_steps", "optimizer.freeze_body_steps"),
    Flag("--ema_decay", "optimizer.ema_decay"),
    Flag("--weight_decay", "optimizer.weight_decay"),
    Flag("--clip_grad", "optimizer.clip_grad"),
    Flag("--grad_reduce_in_bf16", "optimizer.grad_reduce_in_bf16"),
    Flag("--optimizer_cpu_offload", "optimizer.cpu_offload"),
    Flag("--optimizer_offload_fraction", "optimizer.offload_fraction"),
)


def optimizer_problems(optimizer: OptimizerConfig, max_steps: int, dtype: str | None) -> list[str]:
    """What the settings lack, or have too much of.

    Args:
        optimizer: the settings.
        max_steps: of the run.
        dtype: of the model, where it was given.
    """
    problems = _schedule_problems(optimizer, max_steps)
    if optimizer.grad_reduce_in_bf16 and dtype == "float32":
        problems.append(
            "--grad_reduce_in_bf16 keeps the gradients of a model in bfloat16, but this one is in "
            "float32: give --dtype bfloat16, or leave it out"
        )
    if optimizer.offload_fraction is not None and not optimizer.cpu_offload:
        problems.append(
            "--optimizer_offload_fraction has no effect without --optimizer_cpu_offload"
        )
    return problems


def _schedule_problems(optimizer: OptimizerConfig, max_steps: int) -> list[str]:
    problems, style = [], optimizer.lr_decay_style
    if optimizer.min_lr is not None and optimizer.min_lr > optimizer.lr:
        problems.append(f"--min_lr {optimizer.min_lr} must be at most --lr {optimizer.lr}")
    warmup = optimizer.warmup_steps(max_steps)
    if optimizer.lr_warmup_steps is not None and warmup >= max_steps:
        problems.append(f"--lr_warmup_steps {warmup} must be below --max_steps {max_steps}")
    elif style == "wsd":
        decay = optimizer.wsd_decay_steps(max_steps)
        if decay + warmup > max_steps:
            problems.append(
                f"--lr_wsd_decay_steps {decay} and --lr_warmup_steps {warmup} together must be at "
                f"most --max_steps {max_steps}"
            )
    if style != "wsd":
        problems += [
            f"--{name} {given} has no effect with --lr_decay_style {style}: give wsd"
            for name in ("lr_wsd_decay_steps", "lr_wsd_decay_style")
            if (given := getattr(optimizer, name)) != getattr(OptimizerConfig, name)
        ]
    return problems
