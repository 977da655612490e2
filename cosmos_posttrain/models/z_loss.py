"""The z-loss: keeps the logits' sum of exponentials near one (PaLM, arXiv:2204.02311, section 5).

Flows in: logits (S, B, V / TP) of this rank's columns. Flows out: ``log(sum(exp(logits)))^2``
(S, B) over the whole vocabulary, the same on every tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor


class _LogSum(torch.autograd.Function):
    """Log of the sum of exponentials over the columns of all tensor-parallel ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        wide = logits.float()
        largest = wide.amax(dim=-1)
        _all_reduce(largest, torch.distributed.ReduceOp.MAX)
        mass = (wide - largest[..., None]).exp().sum(dim=-1)
        _all_reduce(mass, torch.distributed.ReduceOp.SUM)
        log_sum = largest + mass.log()
        ctx.save_for_backward(logits, log_sum)
        return log_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        logits, log_sum = ctx.saved_tensors
        share = (logits.float() - log_sum[..., None]).exp()
        return (share * grads[0][..., None]).to(logits.dtype)


def _all_reduce(values: Tensor, operation: Any) -> None:
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_reduce(values, op=operation, group=group)


def z_loss(logits: Tensor) -> Tensor:
    """The square of the log of the sum of exponentials.

    Args:
        logits: (..., V / TP), -inf in columns that stand for no token.

    Returns:
        (...) float32, of which every rank's backward pass gives its own columns' gradient.
    """
    found: Tensor = _LogSum.apply(logits)
    return found.square()
