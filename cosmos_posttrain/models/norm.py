"""RMSNorm that works under sequence parallelism on any device.

Megatron's own torch norm refuses sequence parallelism; this one marks its weight, so that Megatron
sums the weight's gradients over the tensor-parallel group. For the backward pass it keeps its input
and one number a row, and computes the rest again.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from cosmos_posttrain.models import compiling
from cosmos_posttrain.models.blocks import row_blocks


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, computed in float32 (arXiv:1910.07467).

    Args:
        config: Megatron's config; gives the parameters' dtype and whether sequence parallelism is
            on.
        hidden_size: width of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Read by Megatron when it reduces gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis; returns the shape and dtype of ``x``."""
        if self.training and compiling.is_on():
            return _compiled(x, self.weight, self.eps)
        if torch.is_grad_enabled():
            normalised: Tensor = _Norm.apply(x, self.weight, self.eps)
            return normalised
        return _normalise(x, self.weight, self.eps)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * inverse_root_mean_square(wide, eps)
    return wide.type_as(x) * weight


_compiled = compiling.compilable(_normalise)


def inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    """(..., D) float32 -> (..., 1)."""
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class _Norm(torch.autograd.Function):
    """One step of autograd, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        output = torch.empty_like(rows)
        scales = torch.empty(len(rows), 1, device=x.device)
        for part in row_blocks(rows):
            wide = rows[part].float()
            scales[part] = inverse_root_mean_square(wide, eps)
            torch.mul((wide * scales[part]).type_as(x), weight, out=output[part])
        ctx.save_for_backward(x, weight, scales)
        return output.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scales = ctx.saved_tensors
        rows, upstream = (t.reshape(-1, x.shape[-1]) for t in (x, grads[0]))
        result = torch.empty_like(rows)
        wide_weight = weight.float()
        weight_grad = torch.zeros_like(wide_weight)
        for part in row_blocks(rows):
            grad, scale = upstream[part].float(), scales[part]
            normalised = rows[part] * scale
            product = grad * normalised
            weight_grad += product.sum(0)
            # Mean of (weight * grad * normalised) over a row: the part along the input.
            along = (product @ wide_weight)[:, None] / rows.shape[1]
            own = grad * wide_weight
            result[part] = own.addcmul_(normalised, along, value=-1).mul_(scale)
        return result.view(x.shape), weight_grad.type_as(weight), None
