"""From the packed projection to queries, keys and values, in one step of autograd.

Flows in: Megatron's packed projection (S, B, groups * (n + 2) * D): of every group its n queries,
then its key, then its value. Flows out: queries and keys, normalised (RMSNorm per head) and rotated
(RoPE), and values. For the backward pass it keeps its input and one number a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain.models import compiling
from cosmos_posttrain.models.blocks import row_blocks
from cosmos_posttrain.models.norm import inverse_root_mean_square
from cosmos_posttrain.models.rope import swap_halves


def rotated_heads(
    packed: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    rows: Tensor,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values for attention; computed in float32.

    Args:
        packed: (S, B, groups * (n + 2) * D).
        query_weight: (D,) of the queries' norm.
        key_weight: (D,) of the keys' norm.
        rows: (2, S, 1, 1, D), see ``rope.rotary_table``.
        num_groups: of this rank.
        eps: of the norms.

    Returns:
        (S, B, groups * n, D), (S, B, groups, D), (S, B, groups, D) in the dtype of ``packed``.
    """
    heads = _compiled if compiling.is_on() else _Heads.apply
    query, key, value = heads(packed, query_weight, key_weight, rows, num_groups, eps)
    return query, key, value


def _weights(query: Tensor, key: Tensor, num_queries: int) -> Tensor:
    """(n + 1, D) float32: those of a group's queries, and its key's."""
    return torch.cat([query.expand(num_queries, -1), key[None]]).float()


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """``rope.rotate`` of float32 (..., D)."""
    half = x.shape[-1] // 2
    result = x * cosines
    result[..., :half].addcmul_(x[..., half:], sines[..., :half])
    result[..., half:].addcmul_(x[..., :half], sines[..., half:])
    return result


def _rotate_back(grad: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    half = grad.shape[-1] // 2
    result = grad * cosines
    result[..., :half].addcmul_(grad[..., half:], sines[..., half:])
    result[..., half:].addcmul_(grad[..., :half], sines[..., :half])
    return result


@compiling.compilable
def _compiled(
    packed: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    rows: Tensor,
    num_groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = packed.unflatten(-1, (num_groups, -1, query_weight.shape[0]))
    num_queries = heads.shape[3] - 2
    wide = heads[..., :-1, :].float()
    wide = wide * inverse_root_mean_square(wide, eps)
    wide = wide * _weights(query_weight, key_weight, num_queries)
    cosines, sines = rows[:, :, :, :, None].float()
    rotated = (wide * cosines + swap_halves(wide) * sines).type_as(packed)
    query, key = rotated[..., :-1, :].flatten(2, 3), rotated[..., -1, :].contiguous()
    return query, key, heads[..., -1, :].contiguous()


class _Heads(torch.autograd.Function):
    """Some positions at a time; s positions, B clips, G groups, n queries a group below."""

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        query_weight: Tensor,
        key_weight: Tensor,
        rows: Tensor,
        num_groups: int,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dim = query_weight.shape[0]
        heads = packed.unflatten(-1, (num_groups, -1, dim))  # (S, B, G, n + 2, D)
        num_queries = heads.shape[3] - 2
        weights = _weights(query_weight, key_weight, num_queries)
        query = packed.new_empty(*heads.shape[:3], num_queries, dim)
        key = packed.new_empty(*heads.shape[:3], dim)
        scales = torch.empty(*heads.shape[:3], num_queries + 1, 1, device=packed.device)
        cosines, sines = rows[:, :, :, :, None].float()
        for part in row_blocks(packed):
            wide = heads[part, :, :, :-1].float()
            scales[part] = inverse_root_mean_square(wide, eps)
            normalised = (wide * scales[part]).mul_(weights)
            rotated = _rotate(normalised, cosines[part], sines[part])
            query[part], key[part] = rotated[..., :-1, :], rotated[..., -1, :]
        ctx.save_for_backward(packed, query_weight, key_weight, rows, scales)
        return query.flatten(2, 3), key, heads[..., -1, :].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed, query_weight, key_weight, rows, scales = ctx.saved_tensors
        query_grad, key_grad, value_grad = grads
        num_groups, dim = key_grad.shape[2:]
        heads = packed.unflatten(-1, (num_groups, -1, dim))
        num_queries = heads.shape[3] - 2
        query_grad = query_grad.unflatten(2, (num_groups, num_queries))
        weights = _weights(query_weight, key_weight, num_queries)
        weights_grad = torch.zeros_like(weights)
        result = torch.empty_like(heads)
        result[..., -1, :] = value_grad
        cosines, sines = rows[:, :, :, :, None].float()
        for part in row_blocks(packed):
            scale = scales[part]
            upstream = torch.empty(
                *scale.shape[:-1], dim, dtype=torch.float32, device=packed.device
            )
            upstream[..., :-1, :], upstream[..., -1, :] = query_grad[part], key_grad[part]
            grad = _rotate_back(upstream, cosines[part], sines[part])
            normalised = heads[part, :, :, :-1] * scale
            weights_grad += (grad * normalised).sum((0, 1, 2))
            grad.mul_(weights)
            along = (grad * normalised).mean(-1, keepdim=True)
            result[part, :, :, :-1] = grad.addcmul_(normalised, along, value=-1).mul_(scale)
        return (
            result.view(packed.shape),
            weights_grad[:-1].sum(0).type_as(query_weight),
            weights_grad[-1].type_as(key_weight),
            None,
            None,
            None,
        )
