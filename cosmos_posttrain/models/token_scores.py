"""How well a model foresaw each token: its loss, its rank, and what is left beyond the first ranks.

Flows in: hidden states (S, B, H) behind the last norm, or logits, of which each tensor-parallel
rank has its columns. Flows out: ``TokenScores``, from which every figure of a teacher-forced
evaluation is arithmetic. Logits are made some rows at a time: 12,800 tokens by 64,000 codes would
be 3.3 GB in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from cosmos_posttrain.models.gpt_model import CosmosGPTModel

NUM_TOP = 500  # of the 1X challenge's score
_AT_ONCE = 1 << 24  # logits of one rank at the same time, 64 MB in float32


@dataclass(frozen=True)
class TokenScores:
    """Scores of the labels under a model; all of one shape.

    Attributes:
        nll: float32, cross-entropy in nats.
        rank: int32, how many tokens are more likely; of two that are equally likely the lower
            number comes first, so that the token of rank 0 is what a greedy decoder takes.
        log_rest: float32, log of the probability outside the ``NUM_TOP`` most likely tokens; -inf
            where there are no others.
    """

    nll: Tensor
    rank: Tensor
    log_rest: Tensor

    def map(self, function: Any) -> TokenScores:
        """The same function of each of the three."""
        return TokenScores(function(self.nll), function(self.rank), function(self.log_rest))


def score_logits(
    logits: Tensor, labels: Tensor, num_top: int = NUM_TOP, first: int = 0, group: Any = None
) -> TokenScores:
    """Scores labels under logits.

    Args:
        logits: (N, columns) of this rank's part of the vocabulary, any floating dtype; -inf where
            a column stands for no token.
        labels: (N,) int64, numbers in the whole vocabulary.
        num_top: how many most likely tokens ``log_rest`` leaves out.
        first: number of this rank's first column.
        group: of the ranks that share the vocabulary; None where one has all of it.

    Returns:
        Scores (N,), the same on all of those ranks.
    """
    logits = logits.float()
    columns = torch.arange(first, first + logits.shape[1], device=logits.device)
    is_here = (labels >= first) & (labels < first + logits.shape[1])
    own = logits.gather(1, torch.where(is_here, labels - first, 0)[:, None])[:, 0]
    target = _reduce(torch.where(is_here, own, float("-inf")), "MAX", group)
    largest = _reduce(logits.amax(dim=1), "MAX", group)
    mass = _reduce((logits - largest[:, None]).exp().sum(dim=1), "SUM", group)
    is_before = logits > target[:, None]
    is_before |= (logits == target[:, None]) & (columns < labels[:, None])
    rank = _reduce(is_before.sum(dim=1, dtype=torch.int32), "SUM", group)
    nll = largest + mass.log() - target
    return TokenScores(nll, rank, _rest(logits, largest, num_top, group) - mass.log())


def _rest(logits: Tensor, largest: Tensor, num_top: int, group: Any) -> Tensor:
    """(N,) log of the sum of exp(logit - largest) outside the ``num_top`` largest logits."""
    top = logits.topk(min(num_top, logits.shape[1]), dim=1).values
    if group is not None:
        parts = [torch.empty_like(top) for _ in range(torch.distributed.get_world_size(group))]
        torch.distributed.all_gather(parts, top.contiguous(), group=group)
        top = torch.cat(parts, dim=1)
        top = top.topk(min(num_top, top.shape[1]), dim=1).values
    if top.shape[1] < num_top:
        return torch.full_like(largest, float("-inf"))
    last = top[:, -1:]
    # Measured from the last of the top: however likely the first is, nothing underflows.
    shifted = torch.where(logits < last, logits - last, float("-inf"))
    below = _reduce(shifted.exp().sum(dim=1), "SUM", group)
    num_equal = _reduce((logits == last).sum(dim=1, dtype=torch.int32), "SUM", group)
    num_equal -= (top == last).sum(dim=1, dtype=torch.int32)  # of these the top has some
    return (below + num_equal).log() + last[:, 0] - largest


def _reduce(values: Tensor, operation: str, group: Any) -> Tensor:
    if group is not None:
        values = values.contiguous()
        torch.distributed.all_reduce(
            values, op=getattr(torch.distributed.ReduceOp, operation), group=group
        )
    return values


def score_hidden(module: CosmosGPTModel, hidden: Tensor, labels: Tensor) -> TokenScores:
    """Scores labels under a model's hidden states, some positions at a time.

    Args:
        module: this rank's part of the model, of the last pipeline stage.
        hidden: (S, B, H) what ``module`` gives under ``hidden_states_only``; under sequence
            parallelism this rank's part, (S / TP, B, H).
        labels: (B, S) int64.

    Returns:
        Scores (B, S), the same on all tensor-parallel ranks.
    """
    config, group = module.model_config, None
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        group = parallel_state.get_tensor_model_parallel_group()
    if module.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    weight = module.output_layer.weight
    first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
    num_surplus = max(first + len(weight) - config.vocab_size, 0)
    batch_size = labels.shape[0]
    rows, targets = hidden.flatten(0, 1), labels.t().flatten()
    at_once = max(_AT_ONCE // len(weight), 1)
    # Made first: small results kept between the large ones of each round would fragment the heap.
    found = TokenScores(
        torch.empty(len(rows), device=rows.device),
        torch.empty(len(rows), dtype=torch.int32, device=rows.device),
        torch.empty(len(rows), device=rows.device),
    )
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        logits = torch.nn.functional.linear(rows[part], weight)
        if num_surplus:  # rows that only pad the vocabulary
            logits[:, -num_surplus:] = float("-inf")
        scores = score_logits(logits, targets[part], first=first, group=group)
        found.nll[part], found.rank[part] = scores.nll, scores.rank
        found.log_rest[part] = scores.log_rest
    return found.map(lambda x: x.view(-1, batch_size).t().contiguous())
