"""The optimizer, from Megatron-Core.

Flows in: the model wrapped for data parallelism and the run's config. Flows out: Megatron's
distributed optimizer (AdamW), and the optimizer as checkpoints see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.pieces import MASTER, OwnPart
from cosmos_posttrain.checkpoint.torch_dist import AVERAGE
from cosmos_posttrain.distributed.cpu_device import cpu_device, cuda_calls_mean_cpu
from cosmos_posttrain.models.chunks import chunks_of
from cosmos_posttrain.training import offload
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.schedule import BODY, min_lr, row_rates

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(config: TrainConfig, model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Megatron's distributed optimizer over this rank's parameters."""
    settings = config.optimizer
    row_lr, row_min_lr = row_rates(settings) or (None, None)
    megatron_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=min_lr(settings),
        decoupled_lr=row_lr,
        decoupled_min_lr=row_min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )
    offload.configure(megatron_config, settings)
    with cpu_device(), offload.building(settings):
        optimizer = get_megatron_optimizer(
            megatron_config, chunks_of(model), use_gloo_process_groups=torch.cuda.is_available()
        )
    for part in parts_of(optimizer):
        _fuse(part.optimizer)
        offload.order_streams(part.optimizer)
    if row_lr is not None:
        _tell_body_from_rows(optimizer)
    return optimizer


def _fuse(optimizer: Any) -> None:
    """Lets torch's AdamW (where Transformer Engine's and apex's are absent) update in one pass."""
    if not _counts_in_state(optimizer) or not _has_fused_kernel():
        return
    for group in optimizer.param_groups:
        group["fused"] = True
    optimizer.grad_scale = None


def _has_fused_kernel() -> bool:
    return launch.device().type in _get_fused_kernels_supported_devices()


def is_fused(optimizer: Any) -> bool:
    """Whether it is torch's AdamW, updating in one pass."""
    return _counts_in_state(optimizer) and all(g["fused"] for g in optimizer.param_groups)


def is_row(parameter: Tensor) -> bool:
    """Whether it is the embedding or the output layer, as Megatron's models mark them."""
    return getattr(parameter, "is_embedding_or_output_parameter", False)


def _tell_body_from_rows(optimizer: Any) -> None:
    """Marks this rank's parameter groups for the schedule."""
    for part in parts_of(optimizer):
        for parameter, (number, _) in part.model_param_group_index_map.items():
            part.optimizer.param_groups[number][BODY] = not is_row(parameter)


def drop_body_gradients(optimizer: Any) -> None:
    """Zeroes the gradients of all but embedding and output rows, before their norm is taken."""
    for part in parts_of(optimizer):
        for parameter in part.model_param_group_index_map:
            if not is_row(parameter):
                parameter.main_grad.zero_()


def apply_gradients(optimizer: Any, norm: float) -> None:
    """Clips the gradient, whose norm is known, and updates the parameters."""
    for part in parts_of(optimizer):
        # Megatron's formula.
        clip = part.config.clip_grad
        factor = clip / (norm + 1e-6) if clip > 0 else 1.0
        if factor < 1:
            for inner in offload.inner_optimizers(part.optimizer):
                _scale(part.optimizer, inner, factor)
    with cuda_calls_mean_cpu():
        optimizer.step_with_ready_grads()
    for part in parts_of(optimizer):
        for inner in offload.inner_optimizers(part.optimizer):
            inner.grad_scale = None
        offload.forget_gradients(part.optimizer)


def _scale(optimizer: Any, inner: Any, factor: float) -> None:
    """Torch's fused AdamW scales gradients as it reads them; others get a pass of its own."""
    mains = [main for group in inner.param_groups for main in group["params"]]
    if not mains:
        return
    if is_fused(inner):
        inner.grad_scale = torch.full((), 1 / factor, device=mains[0].device)
    else:
        gradients = [offload.gradient_of(offload.parameter_of(optimizer, main)) for main in mains]
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], factor)


def parts_of(optimizer: Any) -> Iterator[Any]:
    """Megatron's optimizers behind one that may chain several."""
    yield from getattr(optimizer, "chained_optimizers", [optimizer])


class CheckpointableOptimizer:
    """Megatron's distributed optimizer as checkpoints see it; see ``checkpoint.pieces``.

    Args:
        optimizer: Megatron's, which keeps of each parameter a range on each data-parallel rank.
        has_average: keep an average of the weights beside them; it begins as they are when it is
            first asked for.

    Attributes:
        optimizer: the same.
    """

    def __init__(self, optimizer: Any, has_average: bool = False) -> None:
        self.optimizer = optimizer
        self._averages: dict[int, Tensor] | None = {} if has_average else None

    def own_parts(self) -> Iterator[OwnPart]:
        """What this rank keeps of each parameter: views of the optimizer's own memory."""
        for part in parts_of(self.optimizer):
            states = _make_state(part)
            for parameter, (group, order) in part.model_param_group_index_map.items():
                own = part.optimizer.param_groups[group]["params"][order]
                main = offload.main_of(part.optimizer, own)
                state = {name: states[main][name] for name in MOMENTS}
                if main.dtype != parameter.dtype:
                    state[MASTER] = main.detach()
                if self._averages is not None:
                    state[AVERAGE] = self._average_of(main)
                numbers = part._get_model_param_range_map(parameter)["param"]
                yield OwnPart(parameter, numbers.start, numbers.end, state)

    def _average_of(self, main: Tensor) -> Tensor:
        assert self._averages is not None
        average = self._averages.get(id(main))
        if average is None:
            average = self._averages[id(main)] = main.detach().clone()
        return average

    def average(self, decay: float) -> None:
        """Moves the average towards the weights: ``decay`` of it stays."""
        with torch.no_grad():
            for inner in self._inner():
                mains = [main for group in inner.param_groups for main in group["params"]]
                if mains:
                    averages = [self._average_of(main) for main in mains]
                    torch._foreach_lerp_(averages, mains, 1 - decay)

    def param_groups(self) -> list[dict[str, Any]]:
        """Settings of the parameter groups, and the number of steps as ``step``."""
        step = self._step()
        return [
            group | {"step": step}
            for part in parts_of(self.optimizer)
            for group in offload.plain_settings(part.optimizer)
        ]

    def take_weights(self) -> None:
        """Begins with the model's weights as they are now."""
        self.optimizer.reload_model_params()
        self._follow_weights()

    def _follow_weights(self) -> None:
        for part in parts_of(self.optimizer):
            offload.follow_weights(part.optimizer)

    def set_step(self, step: int) -> None:
        """Goes on counting at ``step`` completed steps, with all that was loaded."""
        self._follow_weights()
        for inner in self._inner():
            if _counts_in_state(inner):
                for state in inner.state.values():
                    state["step"].fill_(step)
            else:
                for group in inner.param_groups:
                    group["step"] = step

    def _step(self) -> int:
        counts = [0]
        for inner in self._inner():
            counts += [int(state.get("step", 0)) for state in inner.state.values()]
            counts += [int(group.get("step", 0)) for group in inner.param_groups]
        return max(counts)

    def _inner(self) -> Iterator[Any]:
        for part in parts_of(self.optimizer):
            yield from offload.inner_optimizers(part.optimizer)


def _counts_in_state(optimizer: Any) -> bool:
    """Whether the optimizer is torch's; Transformer Engine's and apex's count in their groups."""
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _make_state(part: Any) -> dict[Tensor, dict[str, Any]]:
    """Adam's moments and counters, of zeros where it has not stepped yet."""
    states = {}
    for inner in offload.inner_optimizers(part.optimizer):
        for group in inner.param_groups:
            for main in group["params"]:
                state = states[main] = inner.state[main]
                for name in MOMENTS:
                    if name not in state:
                        state[name] = torch.zeros_like(main)
                if _counts_in_state(inner) and "step" not in state:
                    on_device = group["capturable"] or group["fused"]
                    state["step"] = torch.zeros((), device=main.device if on_device else "cpu")
    return states
