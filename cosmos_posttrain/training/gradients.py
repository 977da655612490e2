"""Gradient buffers without passes that do nothing.

Flows in: a model with Megatron's gradient buffers. Flows out: the same, where weight gradients are
computed straight into their buffers (no zeros, no second addition), and where a rank that is alone
with its parameters exchanges nothing with itself.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import layers
from torch import Tensor

from cosmos_posttrain.models.weight_gradients import add_weight_gradient


class _WeightGradients:
    """Stands for apex's extension, by whose name Megatron's linear layers call it."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grads: Tensor, main_grad: Tensor) -> None:
        """Adds ``grads^T inputs`` to a float32 buffer, or sets it where it holds an old step's."""
        add_weight_gradient(inputs, grads, main_grad)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


def fuse_weight_gradients() -> bool:
    """Lets Megatron's linear layers add weight gradients to the buffers themselves.

    On a GPU that is apex's part, where the machine has it.

    Returns:
        Whether models may be built with ``gradient_accumulation_fusion``.
    """
    if not torch.cuda.is_available() and not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = _WeightGradients
        layers._grad_accum_fusion_available = True
    return bool(layers._grad_accum_fusion_available)


def _is_ours() -> bool:
    return getattr(layers, "fused_weight_gradient_mlp_cuda", None) is _WeightGradients


def forget_gradients(ddp: DistributedDataParallel) -> None:
    """Megatron's ``zero_grad_buffer``; what will be replaced anyway is not filled with zeros."""
    if not _is_ours():
        ddp.zero_grad_buffer()
        return
    for parameter in ddp.params_with_grad:
        # Megatron's linear layers set this when they have added to the buffer.
        if parameter.grad_added_to_main_grad:
            parameter.main_grad.is_old = True
        else:
            parameter.main_grad.zero_()
        parameter.grad_added_to_main_grad = False
    for group in ddp.bucket_groups:
        group.reset()


def complete_gradients(ddp: DistributedDataParallel) -> None:
    """Fills with zeros what no backward pass of this step has reached."""
    for parameter in ddp.params_with_grad if _is_ours() else ():
        if getattr(parameter.main_grad, "is_old", False):
            parameter.main_grad.zero_()
            parameter.main_grad.is_old = False


def skip_exchange_with_oneself(ddp: DistributedDataParallel) -> None:
    """Takes the data-parallel collectives out where one rank has all of the parameters.

    A collective of one rank copies its buffers all the same.
    """
    if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
        return

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        """Gradients are summed and parameters are gathered."""

    for group in ddp.bucket_groups:
        for name in ("start_grad_sync", "finish_grad_sync", "start_param_sync"):
            setattr(group, name, nothing)
