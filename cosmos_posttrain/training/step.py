"""One pass of a global batch through the model: batches in, losses out.

Shapes: everything in a batch is (B, S), one clip a row. Knows no kind of model: what a batch
carries, the model gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from cosmos_posttrain.data.batch import Batch
from cosmos_posttrain.distributed.cpu_device import cpu_device, cuda_calls_mean_cpu, plain_torch
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.rope import context_parallel_positions


def _own_part(batch: Batch, device: torch.device) -> Batch:
    """What this context-parallel rank works on, (B, S / CP), on its device."""
    batch = batch.to(device)
    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    return batch.at(context_parallel_positions(batch.tokens.shape[1], device))


def _loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the losses in nats and number of predicted tokens, as Megatron's schedules want."""
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    return total, count.to(torch.int), {"sum": total.detach(), "count": count}


def forward(batches: Iterator[Batch], model: Any, with_labels: bool) -> tuple[Tensor, Batch]:
    """Takes the next micro-batch through this rank's part of the model.

    Args:
        batches: whole ones.
        model: of this rank.
        with_labels: whether the last stage gives losses (B, S) or what it gives without labels.

    Returns:
        What the model gave, and this rank's part of the batch.
    """
    with plain_torch(), cuda_calls_mean_cpu():
        batch = _own_part(next(batches), next(model.parameters()).device)
        more = {} if batch.context is None else {"context": batch.context}
        if with_labels:
            more["labels"] = batch.labels
        return model(batch.tokens, None, None, **more), batch


def _forward_step(batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    losses, batch = forward(batches, model, with_labels=True)
    return losses, partial(_loss, batch.loss_mask)


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


def run_schedule(
    model: Any,
    batches: list[Batch],
    forward_step: Callable[[Iterator[Batch], Any], tuple[Tensor, Any]],
    forward_only: bool,
) -> list[Any]:
    """Takes micro-batches through all pipeline stages, by Megatron's schedule.

    Returns:
        What ``forward_step``'s second part made of each, on the last stage; empty on others.
    """
    micro_batch_size, seq_length = batches[0].tokens.shape
    with cpu_device():
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    return outputs


def run_batches(
    ddp: DistributedDataParallel, batches: list[Batch], forward_only: bool = False
) -> tuple[float, int]:
    """Runs all micro-batches of a global batch.

    Returns:
        Mean loss in nats per predicted token over the whole global batch, and the number of
        predicted tokens; the same on every rank.
    """
    model: CosmosGPTModel = ddp.module
    outputs = run_schedule(ddp, batches, _forward_step, forward_only)
    return _reduce(outputs, next(model.parameters()).device)
