"""Medusa heads: guesses of tokens further ahead, from the last hidden state (arXiv:2401.10774).

Flows in: hidden states behind the last norm. Flows out: head k's hidden states, which the model's
own output layer turns into scores of the token k places behind the next one; or their losses.

    head k(x) = x + SiLU(W_k x)

The output layer is the model's own: one head of a 4B model is 17M parameters, and would be 262M
more with 64,000 output rows of its own. ``W_k`` begins as zeros (the head guesses what the model
does), so that fresh heads are the same at every layout. Every tensor-parallel rank has all of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Names of its tensors, in memory and on disk, begin with it.
MEDUSA = "medusa_heads."
# Of the losses (the paper's section 2.2): head k counts DECAY^k, and beside the model's own loss
# all heads together SHARE of that.
DECAY, SHARE = 0.8, 0.2
_AT_ONCE = 1 << 24  # logits of one rank at the same time, 64 MB in float32


class MedusaHead(nn.Module):
    """One head; see the module's docstring.

    Args:
        config: Megatron's config.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.weight = nn.Parameter(torch.zeros(size, size, dtype=config.params_dtype))
        # Read by Megatron when it reduces gradients.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        return ahead(hidden, self.weight)


def ahead(hidden: Tensor, weight: Tensor) -> Tensor:
    """``x + SiLU(W x)``: (..., hidden_size) to the same."""
    return hidden + F.silu(F.linear(hidden, weight))


def head_weights(num_heads: int) -> list[float]:
    """What the loss of each head counts."""
    return [DECAY**number for number in range(1, num_heads + 1)]


def head_losses(
    heads: nn.ModuleList,
    hidden: Tensor,
    output_weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    sequence_parallel: bool,
) -> Tensor:
    """The heads' cross-entropies, weighted and summed where the token stands that they guess.

    So the mask of the model's own loss is right for them, too. The output layer learns nothing from
    them. Logits are made some rows at a time, and again in the backward pass.

    Args:
        heads: of ``MedusaHead``.
        hidden: (S, B, H) behind the last norm; under sequence parallelism this rank's (S / TP, B,
            H).
        output_weight: (V / TP, H), this rank's rows.
        labels: (B, S) int64, the next token of each place.
        vocab_size: rows that stand for tokens, over all ranks.
        sequence_parallel: whether ranks share out the sequence.

    Returns:
        (B, S) float32 in nats; at place s the sum over k of DECAY^k times the loss of what head k
        guesses from place s - k.
    """
    weight = output_weight.detach()
    first = parallel_state.get_tensor_model_parallel_rank() * len(weight)
    surplus = max(first + len(weight) - vocab_size, 0)
    total = torch.zeros(labels.shape, device=hidden.device)
    for number, (head, share) in enumerate(zip(heads, head_weights(len(heads)), strict=True), 1):
        x = head(hidden)
        if sequence_parallel:
            x = gather_from_sequence_parallel_region(x)
        else:
            x = copy_to_tensor_model_parallel_region(x)
        rows, targets = x[:-number].flatten(0, 1), labels[:, number:].t().flatten()
        losses = _cross_entropies(rows, weight, targets, surplus)
        losses = losses.view(-1, labels.shape[0]).t()
        total = total + share * F.pad(losses, (number, 0))
    return total


def _cross_entropies(rows: Tensor, weight: Tensor, targets: Tensor, surplus: int) -> Tensor:
    at_once = max(_AT_ONCE // len(weight), 1)
    parts: list[Any] = []
    for some, wanted in zip(rows.split(at_once), targets.split(at_once), strict=True):
        parts.append(
            checkpoint(
                _cross_entropy,
                some,
                weight,
                wanted,
                surplus,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
    return torch.cat(parts)


def _cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor, surplus: int) -> Tensor:
    """(N,) float32; the last ``surplus`` columns only pad the vocabulary."""
    logits = F.linear(rows, weight).float()
    if surplus:
        columns = torch.arange(logits.shape[1], device=logits.device)
        logits = logits.masked_fill(columns >= logits.shape[1] - surplus, float("-inf"))
    losses: Tensor = vocab_parallel_cross_entropy(logits[:, None], targets[:, None])[:, 0]
    return losses
