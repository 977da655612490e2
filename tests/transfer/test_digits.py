"""Rows of new tokens from the digits of their codes."""

from __future__ import annotations

import pytest
import torch

from cosmos_posttrain.tokenizer.fsq import FSQ
from cosmos_posttrain.transfer import digits
from cosmos_posttrain.transfer.digits import digit_rows, digit_shares, features

LEVELS = (8, 5, 5)


def codes_of(levels: tuple[int, ...]) -> torch.Tensor:
    fsq = FSQ(levels)
    return fsq.indices_to_codes(torch.arange(fsq.vocab_size))


def test_shares_are_one_hot_for_the_same_levels() -> None:
    shares = digit_shares(LEVELS, LEVELS)
    tokens = torch.arange(200)
    expected = (tokens % 8, tokens // 8 % 5, tokens // 40)
    for share, digit, count in zip(shares, expected, LEVELS, strict=True):
        assert torch.equal(share, torch.nn.functional.one_hot(digit, count).float())
    assert features(LEVELS, LEVELS).shape == (200, 18 + 40 + 40 + 25)
    assert features((8, 8, 8, 5, 5, 5)[:4], (8, 8, 8, 5)).shape[1] == 29 + 3 * 64 + 3 * 40


@pytest.mark.parametrize(("new", "old"), [((5, 3), (8, 5)), ((8, 8), (5, 5)), ((7, 2), (7, 8))])
def test_a_digit_between_two_takes_of_both(new: tuple[int, ...], old: tuple[int, ...]) -> None:
    shares = digit_shares(new, old)
    for channel, (share, count) in enumerate(zip(shares, old, strict=True)):
        assert torch.allclose(share.sum(1), torch.ones(len(share)))
        assert int((share > 1e-6).sum(1).max()) <= 2
        # Its mean code is the new token's own, as far as the old channel reaches.
        old_codes = FSQ([count]).indices_to_codes(torch.arange(count))[:, 0]
        wanted = codes_of(new)[:, channel].clamp(old_codes[0], old_codes[-1])
        assert torch.allclose(share @ old_codes, wanted, atol=1e-6)


def test_planted_linear_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are linear in the codes, and in products of two, are read off exactly."""
    monkeypatch.setattr(digits, "PRIOR_TOKENS", 1e-3)
    generator = torch.Generator().manual_seed(0)

    def planted(levels: tuple[int, ...]) -> torch.Tensor:
        codes = codes_of(levels)
        return 3.0 + torch.cat([codes, codes[:, :1] * codes[:, 1:2]], 1) @ effects

    effects = torch.randn(4, 16, generator=generator)
    assert torch.allclose(digit_rows(planted(LEVELS), LEVELS, LEVELS), planted(LEVELS), atol=1e-3)
    # Levels whose codes lie within the old ones'.
    assert torch.allclose(digit_rows(planted((5, 5, 9)), (5, 5, 9), (3, 5, 5)), planted((3, 5, 5)),
                          atol=2e-3)  # fmt: skip


def test_what_digits_do_not_tell_is_smoothed_away() -> None:
    noise = torch.randn(200, 400, generator=torch.Generator().manual_seed(0))
    rows = digit_rows(2.0 + noise, LEVELS, LEVELS)
    assert float(rows.mean()) == pytest.approx(2.0, abs=0.02)
    assert float((rows - rows.mean(0)).square().mean()) < 0.35


def test_the_prior_draws_towards_the_mean() -> None:
    rows = codes_of(LEVELS) @ torch.ones(3, 8)
    drawn = digit_rows(rows, LEVELS, LEVELS)
    spread = float((drawn - drawn.mean(0)).square().mean() / (rows - rows.mean(0)).square().mean())
    assert 0.6 < spread < 0.98
