"""The feed-forward network's SwiGLU on the CPU, without a copy of its halves.

Flows in: (..., 2 F), the gate and what it gates. Flows out: ``silu(gate) * gated``, (..., F). Where
Megatron's fused kernel is on (a GPU), that is used instead.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn.functional import silu

from cosmos_posttrain.models import compiling
from cosmos_posttrain.models.blocks import row_blocks


class GatedColumnLinear(ColumnParallelLinear):
    """The first of its two linear layers: every rank has its part of gates and of gated.

    Megatron-Core 0.15 cuts fresh weights as if they were one piece, so that which ones a model
    begins with would depend on the tensor parallel size; later ones say ``stride`` themselves.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "stride": 2})


class SwiGLUMLP(MLP):
    """Megatron's, with the activation in one step of autograd that keeps nothing but its input."""

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(S, B, hidden_size) -> the same, and no bias; see Megatron's ``MLP.forward``."""
        compiled = self.training and compiling.is_on()
        if self.config.bias_activation_fusion or not (compiled or torch.is_grad_enabled()):
            output: tuple[Tensor, Tensor | None] = super().forward(hidden_states, *args, **kwargs)
            return output
        both, _ = self.linear_fc1(hidden_states)
        output = self.linear_fc2(_compiled(both) if compiled else _SwiGLU.apply(both))
        return output


@compiling.compilable
def _compiled(both: Tensor) -> Tensor:
    gate, gated = both.chunk(2, dim=-1)
    return silu(gate) * gated


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, gated = both.flatten(0, -2).chunk(2, dim=-1)
        output = torch.empty(gate.shape, dtype=both.dtype, device=both.device)
        for part in row_blocks(both.flatten(0, -2)):
            torch.mul(silu(gate[part]), gated[part], out=output[part])
        return output.view(*both.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        rows = both.flatten(0, -2)
        gate, gated = rows.chunk(2, dim=-1)
        upstream = grads[0].flatten(0, -2)
        result = torch.empty_like(rows)
        gate_grad, gated_grad = result.chunk(2, dim=-1)
        for part in row_blocks(rows):
            grad = upstream[part]
            torch.mul(grad, silu(gate[part]), out=gated_grad[part])
            torch.ops.aten.silu_backward.grad_input(
                grad * gated[part], gate[part], grad_input=gate_grad[part]
            )
        return result.view(both.shape)
