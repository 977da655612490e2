"""Optimizer and learning-rate schedule, from Megatron-Core.

Flows in: the model wrapped for data parallelism and the run's config. Flows out: Megatron's
distributed optimizer (AdamW) and its schedule. Two faults of megatron-core 0.16 with torch's AdamW
(where neither Transformer Engine nor apex is installed) are worked around in ``load_state``.
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


def apply_settings(config: TrainConfig, optimizer: Any) -> None:
    """Puts the config's numbers in place of a checkpoint's.

    Megatron keeps them in the parameter groups, which a checkpoint brings along. Weight decay and
    the learning rate itself follow with the schedule's next step.
    """
    settings = config.optimizer
    for part in parts_of(optimizer):
        for group in part.param_groups:
            group["max_lr"], group["min_lr"] = settings.lr, _min_lr(config)
            group["betas"] = (settings.adam_beta1, settings.adam_beta2)
            group["eps"] = settings.adam_eps


def parts_of(optimizer: Any) -> Iterator[Any]:
    """Megatron's optimizers behind one that may chain several."""
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


class CheckpointableOptimizer:
    """The optimizer as checkpoints see it, with the work-arounds for torch's AdamW."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def sharded_state_dict(self, model_state: dict, is_loading: bool, metadata: dict) -> Any:
        """Megatron's sharded state; loading needs state of the right shapes to load into."""
        if is_loading:
            for part in parts_of(self.optimizer):
                if not part.optimizer.state:
                    part._init_optimizer_states_with_dummy_values()
        return self.optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=metadata
        )

    def load_state_dict(self, state: Any) -> None:
        """Loads; AdamW's ``step`` comes from the parameter groups, one tensor per parameter."""
        for part in parts_of(self.optimizer):
            part._set_main_param_and_optimizer_states = _with_own_step(part)
        try:
            self.optimizer.load_state_dict(state)
        finally:
            for part in parts_of(self.optimizer):
                del part._set_main_param_and_optimizer_states
        for part in parts_of(self.optimizer):
            for values in part.optimizer.state.values():
                # Megatron gives all parameters one tensor; it would advance once per parameter.
                if isinstance(values.get("step"), torch.Tensor):
                    values["step"] = values["step"].clone()


def _with_own_step(part: Any) -> Any:
    """Megatron's setter asks the loaded tensors for AdamW's ``step``, which is not among them."""
    original = type(part)._set_main_param_and_optimizer_states

    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        main_param = part.optimizer.param_groups[group]["params"][order]
        step = part.optimizer.state[main_param].get("step")
        if step is not None:
            tensors = {**tensors, "step": step.clone()}
        original(part, model_param, tensors)

    return set_states
