"""Every token of a batch scored, on any layout: the training step's forward without its loss.

Flows in: a model and a batch (B, S). Flows out: ``TokenScores`` (B, S), the same on all ranks that
share the model and the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.data.batch import Batch
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.rope import context_parallel_positions
from cosmos_posttrain.models.token_losses import losses_and_guesses
from cosmos_posttrain.models.token_scores import TokenScores, score_hidden
from cosmos_posttrain.training.step import forward, run_schedule

if TYPE_CHECKING:
    from numpy.typing import NDArray


@torch.no_grad()
def score_batch(model: CosmosGPTModel, batch: Batch) -> TokenScores:
    """Scores the labels of one micro-batch; the ranks that share the model call it together.

    Args:
        model: this rank's part, in evaluation mode.
        batch: the same on all of those ranks, whole, on any device.

    Returns:
        Scores (B, S) on the model's device; of any value where there is no loss.
    """
    outputs: list[TokenScores] = run_schedule(model, [batch], _forward_step, forward_only=True)
    device = next(model.parameters()).device
    return _on_every_rank(outputs, batch.labels.shape, device)


def _forward_step(batches: Iterator[Batch], model: CosmosGPTModel) -> tuple[Tensor, Any]:
    with model.hidden_states_only():
        hidden, batch = forward(batches, model, with_labels=False)
    return hidden, partial(_outcome, model, batch.labels)


def _outcome(
    model: CosmosGPTModel, labels: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, TokenScores]:
    """As Megatron's schedules want it: two numbers that nobody asks for, and the scores."""
    nothing = torch.zeros((), dtype=torch.int, device=hidden.device)
    return nothing.float(), nothing, score_hidden(model, hidden, labels)


def guess(module: CosmosGPTModel, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (B, S) and most likely tokens (B, S) of what ``hidden_states_only`` gives."""
    return losses_and_guesses(
        hidden,
        module.output_layer.weight,
        labels,
        module.model_config.vocab_size,
        module.config.sequence_parallel,
    )


@torch.no_grad()
def guess_batch(model: CosmosGPTModel, batch: Batch) -> Tensor:
    """The most likely tokens of one micro-batch, each behind true ones; (B, S) int64.

    Only without pipeline and context parallelism; the ranks that share the model call it together.

    Args:
        model: this rank's part, in evaluation mode.
        batch: the same on all of those ranks, on any device.
    """

    def step(batches: Iterator[Batch], model: CosmosGPTModel) -> tuple[Tensor, Any]:
        with model.hidden_states_only():
            hidden, own = forward(batches, model, with_labels=False)
        return hidden, partial(outcome, own.labels)

    def outcome(labels: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.zeros((), dtype=torch.int, device=hidden.device)
        return nothing.float(), nothing, guess(model, hidden, labels)[1]

    found: Tensor = run_schedule(model, [batch], step, forward_only=True)[0]
    return found


def _on_every_rank(
    outputs: list[TokenScores], shape: torch.Size, device: torch.device
) -> TokenScores:
    """What the last pipeline stage has, each context-parallel rank a part of it, on all."""
    whole = TokenScores(
        torch.zeros(shape, device=device),
        torch.zeros(shape, dtype=torch.int32, device=device),
        torch.zeros(shape, device=device),
    )
    if outputs:
        whole = outputs[0]
        if parallel_state.get_context_parallel_world_size() > 1:
            positions = context_parallel_positions(shape[1], device)
            whole = whole.map(partial(_whole_sequence, positions=positions, shape=shape))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        group = parallel_state.get_pipeline_model_parallel_group()
        for values in (whole.nll, whole.rank, whole.log_rest):
            torch.distributed.broadcast(values, last, group=group)
    return whole


def _whole_sequence(part: Tensor, positions: Tensor, shape: torch.Size) -> Tensor:
    """(B, S / CP) of each rank -> (B, S) on all: every position is one rank's, zero elsewhere."""
    whole = part.new_zeros(shape)
    whole[:, positions] = part
    torch.distributed.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    return whole


def gather_clips(rows: NDArray[Any]) -> NDArray[Any]:
    """(B, ...) of each data-parallel rank -> (DP * B, ...), rank by rank, on all ranks."""
    size = parallel_state.get_data_parallel_world_size()
    if size == 1:
        return rows
    own = torch.from_numpy(np.ascontiguousarray(rows)).to(launch.device())
    parts = [torch.empty_like(own) for _ in range(size)]
    torch.distributed.all_gather(parts, own, group=parallel_state.get_data_parallel_group())
    return torch.cat(parts).cpu().numpy()
