"""Sampling: the exact set of tokens that may be drawn, frequencies, greedy, both ways to look."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.inference.noise import gumbel, stream_keys
from cosmos_posttrain.inference.sampling import (
    Draw,
    check_sampling,
    choose,
    choose_by_likelihood,
    choose_by_score,
)

WAYS = (choose_by_likelihood, choose_by_score)


def kept_by_definition(
    probabilities: list[float], top_p: float | None, top_k: int | None
) -> list[int]:
    """In plain words: a token stays if those that are more likely hold at most ``top_p``."""
    kept = []
    for token, own in enumerate(probabilities):
        likelier = [other for other in probabilities if other > own]
        within = top_p is None or math.fsum(likelier) <= top_p
        if not likelier or (within and (top_k is None or len(likelier) < top_k)):
            kept.append(token)
    return kept


def keys_of(num: int) -> torch.Tensor:
    return stream_keys(torch.zeros(num).long(), torch.arange(num), torch.zeros(num).long())


def numbers_of(num: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of one place of each of some clips."""
    return lambda tokens: gumbel(keys_of(num), torch.tensor([3]), tokens)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("top_p", "top_k"),
    [(0.0, None), (0.1, None), (0.8, None), (0.999, None), (None, 1), (None, 7), (0.6, 5)],
)
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_the_best_of_what_may_be_drawn(
    way: Callable[..., torch.Tensor], top_p: float | None, top_k: int | None, spread: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = spread * torch.randn(10, 1, 400, generator=generator)
    numbers = numbers_of(10)
    found = way(logits - logits.amax(-1, keepdim=True), numbers, top_p, top_k)
    scores = logits + numbers(torch.arange(400))
    for row, token, score in zip(logits[:, 0], found[:, 0], scores[:, 0], strict=True):
        kept = kept_by_definition(row.double().softmax(-1).tolist(), top_p, top_k)
        assert int(token) == max(kept, key=score.tolist().__getitem__)


@pytest.mark.parametrize("way", WAYS)
def test_the_mass_of_more_likely_tokens_may_equal_top_p(way: Callable[..., torch.Tensor]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(400, 1, 4)
    scaled, numbers = logits - logits.max(), numbers_of(400)

    def drawn(top_p: float, top_k: int | None = None) -> set[int]:
        return set(way(scaled, numbers, top_p, top_k).flatten().tolist())

    assert drawn(0.5) == {0, 1}
    assert drawn(0.49) == {0}
    assert drawn(0.76) == {0, 1, 2, 3}  # equal tokens are treated alike
    assert drawn(0.76, 2) == {0, 1}


def test_draws_follow_the_distribution_renormalised_over_what_may_be_drawn() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    num = 40_000
    logits, keys = probabilities.log().expand(num, 1, 4), keys_of(num)

    def frequencies(**settings: float) -> torch.Tensor:
        tokens = Draw(keys, **settings)(logits, torch.tensor([0]))
        return tokens.flatten().bincount(minlength=4) / num

    # Four standard deviations of a frequency near 0.5 at 40,000 draws are 0.01.
    tolerance = {"atol": 0.01, "rtol": 0}
    torch.testing.assert_close(frequencies(), probabilities, **tolerance)
    # The masses before the tokens 1, 3, 2, 0 are 0, 0.4, 0.7, 0.9.
    expected = torch.tensor([0.0, 4 / 7, 0.0, 3 / 7])
    torch.testing.assert_close(frequencies(top_p=0.6), expected, **tolerance)
    torch.testing.assert_close(frequencies(top_k=2), expected, **tolerance)
    torch.testing.assert_close(frequencies(top_k=3, top_p=0.6), expected, **tolerance)
    squared = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(temperature=0.5), squared, **tolerance)


def test_greedy_and_its_limits_are_the_argmax() -> None:
    logits = torch.randn(50, 1, 64, generator=torch.Generator().manual_seed(3))
    best = logits.argmax(-1)
    for settings in ({"temperature": 0.0}, {"temperature": 1e-30}, {"top_p": 0.0}, {"top_k": 1}):
        assert torch.equal(choose(logits, numbers_of(50), **settings), best), settings


def test_numbers_are_made_for_what_may_be_drawn_alone() -> None:
    logits = torch.linspace(0, -2000, 64_000)[None, None]
    asked: list[int] = []

    def numbers(tokens: torch.Tensor) -> torch.Tensor:
        asked.append(tokens.shape[-1])
        return gumbel(keys_of(1), torch.tensor([0]), tokens)

    choose(logits, numbers, top_p=0.8)
    assert asked == [52]  # 1 - exp(-n / 32) > 0.8
    choose(logits, numbers, temperature=0.0)
    assert len(asked) == 1


def test_a_draw_depends_on_its_place_and_not_on_its_company() -> None:
    logits = torch.randn(3, 6, 500, generator=torch.Generator().manual_seed(5))
    settings = [{}, {"top_p": 0.8}, {"top_k": 40}, {"temperature": 0.7, "top_p": 0.95}]
    for some, prefix in itertools.product(settings, (0, 1)):
        draw = Draw(keys_of(3), prefix, **some)
        whole = draw(logits, torch.arange(10, 16))
        places = torch.tensor([[12], [10], [15]])
        single = logits[torch.arange(3)[:, None], places - 10]
        assert torch.equal(draw(single, places), whole.gather(1, places - 10))
        # What stands before the clip is no place of it.
        shifted = Draw(keys_of(3), prefix + 1, **some)
        assert torch.equal(shifted(logits, torch.arange(11, 17)), whole)


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
