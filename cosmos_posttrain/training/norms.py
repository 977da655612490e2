"""Norms of the whole model's gradients and weights, whichever ranks hold their parts.

Flows in: Megatron's optimizer, of which each rank has a part. Flows out: float32 scalars on the
parameters' device, the same on every rank; nothing waits for them.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.training.offload import gradient_of, main_of
from cosmos_posttrain.training.optimizer import is_row, parts_of


@torch.no_grad()
def gradient_norms(optimizer: Any) -> Tensor:
    """Norms of the gradient, made ready for an update.

    Not finite wherever any rank's gradient is not: Megatron's norm looks at the first
    tensor-parallel rank's copy of those weights that every rank has, so the other copies go in
    with a factor of zero, which NaN and infinity survive.

    Returns:
        (2,): of the whole gradient, and of the token embedding and output rows alone.
    """
    counted: list[Tensor] = []
    copied: list[Tensor] = []
    rows: list[int] = []
    for part in parts_of(optimizer):
        part.prepare_grads()
        row_ids = _row_ids(part)
        for parameter in part.get_parameters():
            gradient = gradient_of(parameter)
            if gradient is None:
                continue
            if not param_is_not_tensor_parallel_duplicate(parameter):
                copied.append(gradient)
                continue
            if id(parameter) in row_ids:
                rows.append(len(counted))
            counted.append(gradient)
    squares = _squares(counted)
    total = squares.sum() + 0 * _squares(copied).sum()
    of_rows = torch.stack([squares[number] for number in rows]) if rows else squares[:0]
    return _summed(optimizer, torch.stack([total, of_rows.sum()])).sqrt()


def _row_ids(part: Any) -> set[int]:
    """Of the main parameters of embedding and output rows."""
    groups = part.optimizer.param_groups
    return {
        id(groups[number]["params"][order])
        for parameter, (number, order) in part.model_param_group_index_map.items()
        if is_row(parameter)
    }


@torch.no_grad()
def parameter_norm(optimizer: Any) -> Tensor:
    """Norm of the weights that are trained, as the optimizer keeps them (float32)."""
    own = [
        main_of(part.optimizer, parameter)
        for part in parts_of(optimizer)
        for parameter in part.get_parameters()
        if param_is_not_tensor_parallel_duplicate(parameter)
    ]
    return _summed(optimizer, _squares(own).sum()).sqrt()


def _squares(tensors: list[Tensor]) -> Tensor:
    """(n,) squared norms, float32, wherever the tensors lie."""
    device = launch.device()
    if not tensors:
        return torch.zeros(0, device=device)
    norms = torch._foreach_norm(tensors, 2, torch.float32)
    return torch.stack([norm.to(device) for norm in norms]).square()


def _summed(optimizer: Any, values: Tensor) -> Tensor:
    """Over the ranks that hold different parts."""
    group = optimizer.get_grad_stats_parallel_group()
    if torch.distributed.get_world_size(group) > 1:
        torch.distributed.all_reduce(values, group=group)
    return values
