"""One optimizer step, and one validation: batches in, losses out.

Shapes: tokens (B, S) int64, one clip a row; labels are the tokens shifted left; the last position
has no label and no weight, so that S stays a multiple of every parallel size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from cosmos_posttrain.distributed.cpu_device import cpu_device, cuda_calls_mean_cpu, plain_torch
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.rope import context_parallel_positions


@dataclass
class Batch:
    """One micro-batch on this rank.

    Attributes:
        tokens: (B, S) int64.
        weights: (B,) float32; 0 for rows that only fill up a last batch.
    """

    tokens: Tensor
    weights: Tensor


def _inputs(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and loss mask (B, S / CP) of this context-parallel rank."""
    tokens = batch.tokens.to(device, non_blocking=True)
    labels = tokens.roll(-1, dims=1)
    mask = torch.ones(tokens.shape, dtype=torch.float32, device=device)
    mask[:, -1] = 0
    mask *= batch.weights.to(device)[:, None]
    if parallel_state.get_context_parallel_world_size() > 1:
        own = context_parallel_positions(tokens.shape[1], device)
        tokens, labels, mask = tokens[:, own], labels[:, own], mask[:, own]
    return tokens, labels, mask


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses in nats and number of predicted tokens, as Megatron's schedules want."""
    total = (losses.float() * mask).sum()
    count = mask.sum()
    return total, count.to(torch.int), {"sum": total.detach(), "count": count}


def _forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    with plain_torch(), cuda_calls_mean_cpu():
        device = next(model.parameters()).device
        tokens, labels, mask = _inputs(next(batches), device)
        output = model(tokens, None, None, labels=labels)
    return output, partial(_loss, mask)


def _reduce(outputs: list[dict[str, Tensor]], device: torch.device) -> tuple[float, int]:
    """Mean loss over all micro-batches and ranks, and the number of predicted tokens."""
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for output in outputs:
        totals += torch.stack([output["sum"].double(), output["count"].double()])
    torch.distributed.all_reduce(
        totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            totals,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return float(totals[0] / totals[1].clamp(min=1)), int(totals[1])


def wire_gradients(ddp: DistributedDataParallel, optimizer: Any) -> None:
    """Tells Megatron's schedules how gradients are scaled, summed and finished."""
    config = ddp.module.config
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = ddp.no_sync
    config.finalize_model_grads_func = finalize_model_grads


def run_batches(
    ddp: DistributedDataParallel,
    batches: list[Batch],
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
) -> tuple[float, int]:
    """Runs all micro-batches of a global batch through Megatron's schedule.

    Returns:
        Mean loss in nats per predicted token over the whole global batch, and the number of
        predicted tokens; the same on every rank.
    """
    model: CosmosGPTModel = ddp.module
    with cpu_device():
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[ddp],
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    return _reduce(outputs, next(model.parameters()).device)
