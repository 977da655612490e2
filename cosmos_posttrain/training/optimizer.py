"""Optimizer and learning-rate schedule, from Megatron-Core.

Flows in: the model wrapped for data parallelism and the run's config. Flows out: Megatron's
distributed optimizer (AdamW) and its schedule, and the optimizer as checkpoints see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from cosmos_posttrain.checkpoint.pieces import MASTER, OwnPart
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.training.config import TrainConfig


def build_optimizer(config: TrainConfig, model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Megatron's distributed optimizer over this rank's parameters."""
    settings = config.optimizer
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=_min_lr(config),
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    with cpu_device():
        return get_megatron_optimizer(
            megatron_config, [model], use_gloo_process_groups=torch.cuda.is_available()
        )


def _min_lr(config: TrainConfig) -> float:
    settings = config.optimizer
    return settings.lr / 10 if settings.min_lr is None else settings.min_lr


def build_schedule(config: TrainConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Linear warm-up, then decay to ``min_lr`` at ``max_steps``; counted in optimizer steps.

    Megatron's schedule starts at 0; ours is one ahead, so that no step has a learning rate of 0.
    """
    settings = config.optimizer
    warmup = settings.lr_warmup_steps
    if warmup is None:
        warmup = config.max_steps // 20
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=_min_lr(config),
        lr_warmup_steps=warmup + 1,
        lr_decay_steps=config.max_steps + 1,
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    schedule.step(increment=1)
    return schedule


def gradient_norm(optimizer: Any) -> float:
    """Norm of the whole model's gradient, made ready for an update; the same on every rank.

    Infinite wherever any rank's gradient is not finite: Megatron's norm looks at the first
    tensor-parallel rank's copy of those weights that every rank has.
    """
    with cpu_device():
        if optimizer.prepare_grads():
            return float("inf")
        norm = float(optimizer.get_grad_norm())
        if parallel_state.get_tensor_model_parallel_world_size() == 1:
            return norm
        is_finite = all(bool(torch.isfinite(copy).all()) for copy in _copied_gradients(optimizer))
        return float("inf") if groups.any_rank(int(not is_finite)) else norm


def _copied_gradients(optimizer: Any) -> Iterator[torch.Tensor]:
    """Gradients of this rank that the norm leaves out."""
    for part in parts_of(optimizer):
        for parameter in part.get_parameters():
            gradient = parameter.grad
            if gradient is not None and not param_is_not_tensor_parallel_duplicate(parameter):
                yield gradient


def apply_gradients(optimizer: Any, norm: float) -> None:
    """Clips the gradient, whose norm is known, and updates the parameters."""
    with cpu_device():
        for part in parts_of(optimizer):
            if part.config.clip_grad > 0 and (parameters := part.get_parameters()):
                clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
        optimizer.step_with_ready_grads()


def parts_of(optimizer: Any) -> Iterator[Any]:
    """Megatron's optimizers behind one that may chain several."""
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


class CheckpointableOptimizer:
    """Megatron's distributed optimizer as checkpoints see it; see ``checkpoint.pieces``.

    Attributes:
        optimizer: Megatron's, which keeps of each parameter a range on each data-parallel rank.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def own_parts(self) -> Iterator[OwnPart]:
        """What this rank keeps of each parameter: views of the optimizer's own memory."""
        for part in parts_of(self.optimizer):
            _make_state(part)
            for parameter, (group, order) in part.model_param_group_index_map.items():
                main = part.optimizer.param_groups[group]["params"][order]
                state = {
                    name: value
                    for name, value in part.optimizer.state[main].items()
                    if isinstance(value, torch.Tensor) and value.shape == main.shape
                }
                if main.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr():
                    state[MASTER] = main.detach()
                numbers = part._get_model_param_range_map(parameter)["param"]
                yield OwnPart(parameter, numbers.start, numbers.end, state)

    def param_groups(self) -> list[dict[str, Any]]:
        """Settings of the parameter groups, and the number of steps as ``step``."""
        step = self._step()
        return [
            {key: value for key, value in group.items() if key != "params"} | {"step": step}
            for part in parts_of(self.optimizer)
            for group in part.optimizer.param_groups
        ]

    def set_step(self, step: int) -> None:
        """Goes on counting at ``step`` completed steps."""
        for part in parts_of(self.optimizer):
            if _counts_in_state(part):
                for state in part.optimizer.state.values():
                    state["step"].fill_(step)
            else:
                for group in part.optimizer.param_groups:
                    group["step"] = step

    def _step(self) -> int:
        counts = [0]
        for part in parts_of(self.optimizer):
            counts += [int(state.get("step", 0)) for state in part.optimizer.state.values()]
            counts += [int(group.get("step", 0)) for group in part.optimizer.param_groups]
        return max(counts)


def _counts_in_state(part: Any) -> bool:
    """Whether the optimizer is torch's; Transformer Engine's and apex's count in their groups."""
    return isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _make_state(part: Any) -> None:
    """Adam's moments (Megatron makes them) and counters, of zeros, where it has not stepped yet."""
    part.init_state_fn(part.optimizer, part.config)
    for group in part.optimizer.param_groups if _counts_in_state(part) else ():
        for main in group["params"]:
            on_device = group["capturable"] or group["fused"]
            step = torch.zeros((), device=main.device if on_device else "cpu")
            part.optimizer.state[main].setdefault("step", step)
