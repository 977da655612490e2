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
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.schedule import BODY, min_lr, row_rates


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
    with cpu_device():
        optimizer = get_megatron_optimizer(
            megatron_config, chunks_of(model), use_gloo_process_groups=torch.cuda.is_available()
        )
    for part in parts_of(optimizer):
        _fuse(part.optimizer)
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
        if factor < 1 and (parameters := part.get_parameters()):
            _scale(part.optimizer, [p.grad for p in parameters if p.grad is not None], factor)
    with cuda_calls_mean_cpu():
        optimizer.step_with_ready_grads()
    for part in parts_of(optimizer):
        part.optimizer.grad_scale = None
        for parameter in part.get_parameters():
            parameter.grad = None  # of gradients in bfloat16 a float32 copy


def _scale(optimizer: Any, gradients: list[Tensor], factor: float) -> None:
    """Torch's fused AdamW scales gradients as it reads them; others get a pass of its own."""
    if is_fused(optimizer):
        optimizer.grad_scale = torch.full((), 1 / factor, device=gradients[0].device)
    else:
        torch._foreach_mul_(gradients, factor)


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
        mains = [
            main
            for part in parts_of(self.optimizer)
            for group in part.optimizer.param_groups
            for main in group["params"]
        ]
        with torch.no_grad():
            if mains:
                torch._foreach_lerp_([self._average_of(main) for main in mains], mains, 1 - decay)

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
            if _counts_in_state(part.optimizer):
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


def _counts_in_state(optimizer: Any) -> bool:
    """Whether the optimizer is torch's; Transformer Engine's and apex's count in their groups."""
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _make_state(part: Any) -> None:
    """Adam's moments (Megatron makes them) and counters, of zeros, where it has not stepped yet."""
    part.init_state_fn(part.optimizer, part.config)
    for group in part.optimizer.param_groups if _counts_in_state(part.optimizer) else ():
        for main in group["params"]:
            on_device = group["capturable"] or group["fused"]
            step = torch.zeros((), device=main.device if on_device else "cpu")
            part.optimizer.state[main].setdefault("step", step)
