"""The z-loss and its gradient, whole and over tensor-parallel ranks."""

from __future__ import annotations

import pytest
import torch
from helpers.distributed_run import run_distributed
from torch import Tensor

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.models.z_loss import z_loss


def _logits() -> Tensor:
    """(5, 2, 12) with large numbers, and a last third that stands for no token."""
    logits = 30 * torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(0))
    logits[..., 5:] = float("-inf")  # of two ranks, the second has none but one such column
    return logits


def z_loss_of_this_rank(size: int) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of their weighted sum; at the top level, for processes."""
    groups.initialize(groups.Parallelism(tensor=size))
    rank = torch.distributed.get_rank()
    own = _logits().chunk(size, dim=-1)[rank].clone().requires_grad_()
    values = z_loss(own)
    (values * torch.arange(10).view(5, 2)).sum().backward()
    assert own.grad is not None
    return values.detach(), own.grad


@pytest.mark.distributed
def test_the_square_of_the_log_of_the_sum() -> None:
    whole = _logits().requires_grad_()
    expected = torch.logsumexp(whole, dim=-1).square()
    (expected * torch.arange(10).view(5, 2)).sum().backward()
    assert whole.grad is not None
    for size in (1, 2):
        parts = run_distributed(z_loss_of_this_rank, size, size)
        for values, _ in parts:
            assert torch.allclose(values, expected.detach(), rtol=1e-6)
        gradient = torch.cat([part for _, part in parts], dim=-1)
        assert torch.allclose(gradient, whole.grad, rtol=1e-5, atol=1e-6)
