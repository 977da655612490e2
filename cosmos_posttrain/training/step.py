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
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from cosmos_posttrain.data.batch import Batch
from cosmos_posttrain.distributed.cpu_device import cpu_device, cuda_calls_mean_cpu, plain_torch
from cosmos_posttrain.models.chunks import chunks_of
from cosmos_posttrain.models.rope import context_parallel_positions
from cosmos_posttrain.training.gradients import complete_gradients


def own_part(batch: Batch, device: torch.device) -> Batch:
    """What this context-parallel rank works on, (B, S / CP).

    Args:
        batch: a whole one.
        device: gets it.
    """
    batch = batch.to(device)
    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    return batch.at(context_parallel_positions(batch.tokens.shape[1], device))


def _loss(loss_mask: Tensor, num_tokens: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """This micro-batch's share of the mean loss, as Megatron's schedules want it.

    Divided by the tokens of the whole global batch before the backward pass, gradients need no pass
    of their own for it. The schedules' count of tokens is left at zero: nobody asks for it.
    """
    share = (losses.float() * loss_mask).sum() / num_tokens
    return share, torch.zeros((), dtype=torch.int, device=share.device), share.detach()


def _num_predicted(batches: list[Batch], device: torch.device) -> Tensor:
    """Predicted tokens of the whole global batch, over all data-parallel ranks; at least 1."""
    own = torch.stack([batch.loss_mask.sum(dtype=torch.float32) for batch in batches]).sum()
    count = own.to(device, non_blocking=True)
    if parallel_state.get_data_parallel_world_size() > 1:
        torch.distributed.all_reduce(count, group=parallel_state.get_data_parallel_group())
    return count.clamp(min=1)


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
        batch = own_part(next(batches), next(model.parameters()).device)
        more = {} if batch.context is None else {"context": batch.context}
        if with_labels:
            more["labels"] = batch.labels
        return model(batch.tokens, None, None, **more), batch


def _forward_step(num_tokens: Tensor, batches: Iterator[Batch], model: Any) -> tuple[Tensor, Any]:
    losses, batch = forward(batches, model, with_labels=True)
    return losses, partial(_loss, batch.loss_mask, num_tokens)


def _mean_loss(shares: list[Tensor], device: torch.device) -> Tensor:
    """Mean over all micro-batches and ranks, float32, on every rank; nothing waits for it."""
    loss = torch.stack(shares).sum() if shares else torch.zeros((), device=device)
    return sum_of_all_ranks(loss)


def sum_of_all_ranks(values: Tensor) -> Tensor:
    """The sum, in place, over the ranks with other clips or positions; the last stage knows it."""
    if parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(values, group=group)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            values,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values


def wire_gradients(ddp: nn.Module, optimizer: Any) -> None:
    """Tells Megatron's schedules how gradients are scaled, summed and finished."""
    chunks = chunks_of(ddp)
    for chunk in chunks:
        config = chunk.module.config
        config.grad_scale_func = optimizer.scale_loss
        config.no_sync_func = [x.no_sync for x in chunks] if len(chunks) > 1 else chunk.no_sync
        config.finalize_model_grads_func = _finish_gradients


def _finish_gradients(models: list[Any], _num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    """Megatron's; gradients were divided by the number of tokens before they were made."""
    for model in models:
        complete_gradients(model)
    with plain_torch():
        finalize_model_grads(models, None, **kwargs)


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
    chunks, count = chunks_of(model), len(batches)
    if len(chunks) > 1 and forward_only:
        # An interleaved pipeline takes as many at a time as it has stages.
        surplus = -count % parallel_state.get_pipeline_model_parallel_world_size()
        batches = [*batches, *batches[-1:] * surplus]
    with cpu_device():
        outputs: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in chunks] if len(chunks) > 1 else iter(batches),
            model=chunks,
            num_microbatches=len(batches),
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
    return outputs[:count]


def run_batches(
    ddp: nn.Module, batches: list[Batch], forward_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Runs all micro-batches of a global batch.

    Args:
        ddp: the model.
        batches: of this rank, on the CPU.
        forward_only: leaves the gradients alone.

    Returns:
        Mean loss in nats per predicted token over the whole global batch, and the number of
        predicted tokens: float32 scalars on the model's device, the same on every rank. A GPU may
        not have computed them yet.
    """
    device = next(ddp.parameters()).device
    num_tokens = _num_predicted(batches, device)
    step = partial(_forward_step, num_tokens)
    return _mean_loss(run_schedule(ddp, batches, step, forward_only), device), num_tokens
