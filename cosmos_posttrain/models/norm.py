"""RMSNorm that works under sequence parallelism on any device.

Megatron's own torch norm refuses sequence parallelism; this one marks its weight, so that Megatron
sums the weight's gradients over the tensor-parallel group.
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


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
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight
