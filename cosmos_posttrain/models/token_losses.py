"""Cross-entropy over a vocabulary that tensor parallelism divides, some positions at a time.

Flows in: hidden states (S, B, H) behind the last norm, and the output layer's weight. Flows out:
the loss of every token. The output layer is part of it, so that the logits of all positions never
stand side by side: 12,800 tokens by 64,000 codes are 3.3 GB in float32. The backward pass computes
them again, unless they are few.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from cosmos_posttrain.models.blocks import row_blocks
from cosmos_posttrain.models.config import positions_at_once
from cosmos_posttrain.models.weight_gradients import WeightGradient


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    sequence_parallel: bool = False,
    z_loss_coefficient: float = 0.0,
) -> Tensor:
    """Loss of every token in nats.

    The z-loss, ``c * log(sum(exp(logits)))^2`` (PaLM, arXiv:2204.02311, section 5), adds its
    gradient and not its value.

    Args:
        hidden: (S, B, H); under sequence parallelism this rank's part, (S / TP, B, H).
        weight: (V / TP, H), this rank's rows of the output layer.
        labels: (B, S) int64, numbers in the whole vocabulary.
        vocab_size: rows from here on only pad the vocabulary and take no part.
        sequence_parallel: whether the tensor-parallel ranks share out the sequence.
        z_loss_coefficient: c.

    Returns:
        (B, S) float32, the same on all tensor-parallel ranks.
    """
    group = None
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        # Each rank's columns give a part of the hidden states' gradient: these two sum them.
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden)
    first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
    columns = max(min(vocab_size - first, len(weight)), 0)
    losses: Tensor = _Losses.apply(
        hidden.flatten(0, 1),
        weight,
        labels.t().flatten(),
        first,
        columns,
        group,
        z_loss_coefficient,
    )
    return losses.view(-1, labels.shape[0]).t().contiguous()


@torch.no_grad()
def losses_and_guesses(
    hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, sequence_parallel: bool = False
) -> tuple[Tensor, Tensor]:
    """Loss of every token, and the token that is the most likely one in its place.

    Of tokens that are equally likely the lower number is the guess, as a greedy decoder takes it.

    Args:
        hidden: as ``token_losses`` takes it.
        weight: likewise.
        labels: likewise.
        vocab_size: likewise.
        sequence_parallel: likewise.

    Returns:
        (B, S) float32 in nats, and (B, S) int64; the same on all tensor-parallel ranks.
    """
    group = None
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
    columns = max(min(vocab_size - first, len(weight)), 0)
    rows, targets = hidden.flatten(0, 1), labels.t().flatten()
    log_mass = torch.empty(len(rows), 1, device=rows.device)
    target = torch.zeros_like(log_mass)
    guesses = torch.empty_like(targets)
    at_once = positions_at_once(len(weight), rows.device.type)
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        logits = _logits(rows[part], weight, columns)
        _find(targets[part], first, columns, logits, target[part])
        guesses[part] = _most_likely(logits, first, group)
        _to_probabilities(logits, log_mass[part], group)
    if group is not None:
        torch.distributed.all_reduce(target, group=group)
    shape = (-1, labels.shape[0])
    return (log_mass - target).view(shape).t().contiguous(), guesses.view(shape).t().contiguous()


def _most_likely(logits: Tensor, first: int, group: Any) -> Tensor:
    """(n,) numbers of the largest logits (n, V / TP) among all ranks' columns."""
    largest, place = logits.max(dim=1)
    place += first
    if group is not None:
        top = largest.clone()
        torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX, group=group)
        place.masked_fill_(largest != top, torch.iinfo(place.dtype).max)
        torch.distributed.all_reduce(place, op=torch.distributed.ReduceOp.MIN, group=group)
    return place


class _Losses(torch.autograd.Function):
    """``log(sum(exp(logits))) - logits[label]`` for N = S * B positions."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        first: int,
        columns: int,
        group: Any,
        z_loss_coefficient: float,
    ) -> Tensor:
        ctx.first, ctx.columns, ctx.z_loss_coefficient = first, columns, z_loss_coefficient
        ctx.at_once = positions_at_once(len(weight), hidden.device.type)
        log_mass = torch.empty(len(hidden), 1, device=hidden.device)
        target = torch.zeros_like(log_mass)
        kept = None
        for start in range(0, len(hidden), ctx.at_once):
            part = slice(start, start + ctx.at_once)
            logits = _logits(hidden[part], weight, columns)
            _find(labels[part], first, columns, logits, target[part])
            _to_probabilities(logits, log_mass[part], group)
            if len(hidden) <= ctx.at_once and any(ctx.needs_input_grad):
                kept = logits
        if group is not None:
            torch.distributed.all_reduce(target, group=group)
        ctx.save_for_backward(hidden, weight, labels, log_mass, kept)
        return (log_mass - target)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_mass, kept = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        collected = WeightGradient(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.at_once):
            part = slice(start, start + ctx.at_once)
            wide = kept
            if wide is None:
                wide = _logits(hidden[part], weight, ctx.columns)
                for block in row_blocks(wide):
                    wide[block].sub_(log_mass[part][block]).exp_()
            if ctx.z_loss_coefficient:
                wide.mul_(1 + 2 * ctx.z_loss_coefficient * log_mass[part])
            _subtract_targets(labels[part], ctx.first, ctx.columns, wide)
            for block in row_blocks(wide):
                wide[block].mul_(grads[0][part][block, None])
            grad = wide.to(hidden.dtype)
            torch.mm(grad, weight, out=hidden_grad[part])
            if collected is not None:
                collected.add(hidden[part], grad)
        weight_grad = None if collected is None else collected.result()
        return hidden_grad, weight_grad, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, columns: int) -> Tensor:
    """(n, V / TP) float32, -inf where a column stands for no token."""
    logits = torch.mm(hidden, weight.t()).float()
    if columns < len(weight):
        logits[:, columns:] = float("-inf")
    return logits


def _own(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """(n, 1): the column of each label here, and whether it is here at all."""
    place = labels[:, None] - first
    is_here = (place >= 0) & (place < columns)
    return place.clamp(0, max(columns - 1, 0)), is_here


def _find(labels: Tensor, first: int, columns: int, logits: Tensor, target: Tensor) -> None:
    """Sets ``target`` (n, 1) to the label's logit where it is one of this rank's."""
    place, is_here = _own(labels, first, columns)
    torch.where(is_here, logits.gather(1, place), target, out=target)


def _subtract_targets(labels: Tensor, first: int, columns: int, probabilities: Tensor) -> None:
    place, is_here = _own(labels, first, columns)
    probabilities.scatter_add_(1, place, -is_here.to(probabilities.dtype))


def _to_probabilities(logits: Tensor, log_mass: Tensor, group: Any) -> None:
    """Turns logits (n, V / TP) into probabilities, in place, and sets their ``log_mass`` (n, 1)."""
    largest = logits.amax(dim=1, keepdim=True)
    if group is not None:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    mass = torch.empty_like(largest)
    for block in row_blocks(logits):
        logits[block].sub_(largest[block]).exp_()
        torch.sum(logits[block], dim=1, keepdim=True, out=mass[block])
    if group is not None:
        torch.distributed.all_reduce(mass, group=group)
    for block in row_blocks(logits):
        logits[block].div_(mass[block])
    log_mass.copy_(mass.log_().add_(largest))
