"""Sampling: the exact set of tokens that top_p keeps, frequencies, seeds, greedy."""

from __future__ import annotations

import pytest
import torch

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.inference.sampling import (
    check_sampling,
    draw_uniform,
    keep_most_likely,
    sample,
)


def kept_by_definition(probabilities: list[float], top_p: float) -> list[bool]:
    """The smallest prefix, in plain words: a token stays if the mass before it is <= top_p."""
    kept, before = [], 0.0
    for probability in probabilities:
        kept.append(before <= top_p)
        before += probability
    return kept


@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.8, 0.999, 1.0])
def test_top_p_keeps_the_tokens_before_which_at_most_that_mass_lies(top_p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.softmax(4 * torch.randn(20, 100, generator=generator), -1)
    probabilities = probabilities.sort(-1, descending=True).values
    keep = keep_most_likely(probabilities, top_p, None)
    assert keep.tolist() == [kept_by_definition(row, top_p) for row in probabilities.tolist()]


def test_the_mass_before_may_equal_top_p() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    assert keep_most_likely(probabilities, 0.5, None).tolist() == [[True, True, False, False]]
    assert keep_most_likely(probabilities, 0.49, None).tolist() == [[True, False, False, False]]
    assert keep_most_likely(probabilities, 0.75, 2).tolist() == [[True, True, False, False]]


def draw_many(logits: torch.Tensor, num: int, **settings: float) -> torch.Tensor:
    uniform = draw_uniform(num, 1, seed=0)[:, 0]
    return sample(logits.expand(num, -1), uniform, **settings)


def test_draws_follow_the_distribution_renormalised_over_what_is_kept() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probabilities.log()[None]
    num = 40_000

    def frequencies(**settings: float) -> torch.Tensor:
        return draw_many(logits, num, **settings).bincount(minlength=4) / num

    # Four standard deviations of a frequency near 0.5 at 40,000 draws are 0.01.
    tolerance = {"atol": 0.01, "rtol": 0}
    torch.testing.assert_close(frequencies(), probabilities, **tolerance)
    # The masses before the sorted tokens 1, 3, 2, 0 are 0, 0.4, 0.7, 0.9.
    expected = torch.tensor([0.0, 4 / 7, 0.0, 3 / 7])
    torch.testing.assert_close(frequencies(top_p=0.6), expected, **tolerance)
    torch.testing.assert_close(frequencies(top_k=2), expected, **tolerance)
    torch.testing.assert_close(frequencies(top_k=3, top_p=0.6), expected, **tolerance)
    squared = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(temperature=0.5), squared, **tolerance)


def test_greedy_and_its_limits_are_the_argmax() -> None:
    logits = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    uniform = draw_uniform(50, 1, seed=9)[:, 0]
    best = logits.argmax(-1)
    for settings in (
        {"temperature": 0.0},
        {"temperature": 1e-30},
        {"top_p": 0.0},
        {"top_k": 1},
    ):
        assert torch.equal(sample(logits, uniform, **settings), best), settings


@pytest.mark.parametrize("settings", [{}, {"top_p": 0.9}, {"top_k": 5}, {"top_p": 0.9, "top_k": 5}])
def test_the_largest_random_number_draws_a_token_that_is_kept(settings: dict) -> None:
    logits = torch.full((1, 64), float("-inf"))
    logits[0, 3:20] = torch.linspace(0, -30, 17)
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for uniform in (almost_one, torch.zeros(1, dtype=torch.float64)):
        assert 3 <= int(sample(logits, uniform, **settings)) < 20


def test_random_numbers_depend_on_the_seed_alone() -> None:
    one = draw_uniform(1, 8, seed=5)
    torch.manual_seed(123)
    assert torch.equal(one, draw_uniform(1, 8, seed=5))
    # The first clip of a larger batch, and a longer call, draw the same.
    assert torch.equal(one, draw_uniform(3, 8, seed=5)[:1])
    assert torch.equal(one, draw_uniform(1, 20, seed=5)[:, :8])
    assert not torch.equal(one, draw_uniform(1, 8, seed=6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-1.0, None, None), "temperature -1.0 must be"),
        ((float("nan"), None, None), "temperature nan must be"),
        ((1.0, 1.5, None), r"top_p 1.5 must lie in \[0, 1\]"),
        ((1.0, -0.1, None), "top_p -0.1"),
        ((1.0, None, 0), "top_k 0 must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sampling(*settings)
