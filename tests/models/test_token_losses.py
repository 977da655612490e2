"""The loss without whole logits, against float64 arithmetic on whole ones."""

from __future__ import annotations

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.memory import peak_memory
from torch import Tensor

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cuda_calls_mean_cpu
from cosmos_posttrain.models import config
from cosmos_posttrain.models.token_losses import losses_and_guesses, token_losses

# Positions, clips, width, rows of the output layer, and those that stand for tokens: the last of
# two ranks has some that do not.
S, B, H, V, VOCAB = 24, 2, 16, 128, 100


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(config.LOGITS_AT_ONCE, "cpu", 7 * V)


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, the output layer, labels, and how much each loss counts."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(S, B, H, generator=generator)
    weight = torch.randn(V, H, generator=generator)
    labels = torch.randint(VOCAB, (B, S), generator=generator)
    counts = torch.rand(B, S, generator=generator)
    counts[:, :5] = 0  # given positions
    return hidden, weight, labels, counts


def _exact(z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (B, S) and the gradients of their weighted sum, with the z-loss, float64."""
    hidden, weight, labels, counts = _inputs()
    hidden, weight = (x.double().requires_grad_() for x in (hidden, weight))
    logits = (hidden @ weight.t())[..., :VOCAB].permute(1, 2, 0)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    ((losses + z_loss * logits.logsumexp(1).square()) * counts).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def _check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


def _alone(z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    groups.initialize(groups.Parallelism())
    hidden, weight, labels, counts = _inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    losses = token_losses(hidden, weight, labels, VOCAB, z_loss_coefficient=z_loss)
    (losses * counts).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return losses.detach(), hidden.grad, weight.grad


def _tied() -> tuple[Tensor, Tensor, Tensor]:
    """As ``_inputs``, where several tokens are often the most likely ones, also on two ranks."""
    hidden, weight, labels, _ = _inputs()
    weight[1::4] = weight[::4].flip(0)  # on either side of the middle or not; others have no twin
    return hidden, weight, labels


def _exact_guesses() -> tuple[Tensor, Tensor]:
    """Losses (B, S) float64, and the first of the largest logits (B, S)."""
    hidden, weight, labels = _tied()
    logits = (hidden.double() @ weight.double().t())[..., :VOCAB].permute(1, 2, 0)
    largest = logits >= logits.amax(1, keepdim=True) - 1e-9
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert 0.2 < (largest.sum(1) > 1).float().mean() < 0.8
    assert (largest.int().argmax(1) >= V // 2).any()  # the second rank alone has it
    return losses, largest.int().argmax(1)


def _check_guesses(found: tuple[Tensor, Tensor]) -> None:
    losses, guesses = _exact_guesses()
    _check(found[:1], (losses,))
    assert torch.equal(found[1], guesses)


def test_the_most_likely_tokens(few_at_once: None) -> None:
    groups.initialize(groups.Parallelism())
    _check_guesses(losses_and_guesses(*_tied(), VOCAB))


def test_all_positions_at_once() -> None:
    _check(_alone(), _exact())


def test_some_positions_at_a_time(few_at_once: None) -> None:
    _check(_alone(), _exact())


def test_the_z_loss_has_a_gradient_and_no_value(few_at_once: None) -> None:
    _check(_alone(0.1), _exact(0.1))


def test_the_z_loss_of_all_positions_at_once() -> None:
    _check(_alone(0.1), _exact(0.1))
    assert not torch.allclose(_exact(0.1)[1], _exact()[1], rtol=0.1)


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    groups.initialize(groups.Parallelism())
    hidden, weight, labels, counts = _inputs()
    hidden.requires_grad_()
    (token_losses(hidden, weight, labels, VOCAB) * counts).sum().backward()
    assert weight.grad is None and hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), _exact()[1], rtol=1e-5, atol=1e-5)


def _on_two_ranks(at_once: int, z_loss: float = 0.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Without and with sequence parallelism; this rank's losses and gradients."""
    groups.initialize(groups.Parallelism(tensor=2))
    config.LOGITS_AT_ONCE["cpu"] = at_once
    rank, results = torch.distributed.get_rank(), []
    for sequence_parallel in (False, True):
        hidden, weight, labels, counts = _inputs()
        weight = weight.chunk(2)[rank].clone().requires_grad_()
        hidden = (hidden.chunk(2)[rank] if sequence_parallel else hidden).clone().requires_grad_()
        with cuda_calls_mean_cpu():
            losses = token_losses(hidden, weight, labels, VOCAB, sequence_parallel, z_loss)
            (losses * counts).sum().backward()
        assert hidden.grad is not None and weight.grad is not None
        results.append((losses.detach(), hidden.grad, weight.grad))
    return results


def _guesses_on_two_ranks(at_once: int) -> list[tuple[Tensor, Tensor]]:
    """Without and with sequence parallelism."""
    groups.initialize(groups.Parallelism(tensor=2))
    config.LOGITS_AT_ONCE["cpu"] = at_once
    rank, (hidden, weight, labels) = torch.distributed.get_rank(), _tied()
    own = weight.chunk(2)[rank]
    with cuda_calls_mean_cpu():
        return [
            losses_and_guesses(part, own, labels, VOCAB, divided)
            for divided, part in ((False, hidden), (True, hidden.chunk(2)[rank]))
        ]


@pytest.mark.distributed
def test_the_most_likely_tokens_of_a_divided_vocabulary() -> None:
    for found in run_distributed(_guesses_on_two_ranks, 2, 5 * V):
        for pair in found:
            _check_guesses(pair)


@pytest.mark.distributed
@pytest.mark.parametrize("at_once", [1 << 24, 5 * V], ids=["whole", "in parts"])
def test_a_divided_vocabulary(at_once: int) -> None:
    losses, hidden_grad, weight_grad = _exact(0.1)
    for rank, (plain, divided) in enumerate(run_distributed(_on_two_ranks, 2, at_once, 0.1)):
        own = weight_grad.chunk(2)[rank]
        _check(plain, (losses, hidden_grad, own))
        _check(divided, (losses, hidden_grad.chunk(2)[rank], own))


def _peaks(positions: int, columns: int, at_once: int) -> tuple[int, int]:
    """Bytes that the loss with its gradients and the guesses take at most; alone in a process."""
    groups.initialize(groups.Parallelism())
    hidden = torch.randn(positions, 1, H, requires_grad=True)
    weight = torch.randn(columns, H, requires_grad=True)
    labels = torch.randint(columns, (1, positions))
    token_losses(hidden[:8], weight, labels[:, :8], columns).sum().backward()  # loads what it needs
    config.LOGITS_AT_ONCE["cpu"] = at_once * columns
    with peak_memory() as peak:
        token_losses(hidden, weight, labels, columns).sum().backward()
    with peak_memory() as of_guesses:
        losses_and_guesses(hidden, weight, labels, columns)
    return peak.num_bytes, of_guesses.num_bytes


@pytest.mark.distributed
def test_logits_of_all_positions_never_stand_side_by_side() -> None:
    positions, columns, at_once = 8192, 8192, 256
    whole = 4 * positions * columns
    # 32 parts, some of them side by side for a moment, and what the allocator keeps of them.
    assert max(run_distributed(_peaks, 1, positions, columns, at_once)[0]) < whole / 2
    assert min(run_distributed(_peaks, 1, positions, columns, positions)[0]) > whole
