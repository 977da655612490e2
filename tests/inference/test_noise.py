"""Random numbers by place: the published generator, its distribution, and nothing but the place."""

from __future__ import annotations

import math

import torch

from cosmos_posttrain.inference.noise import gumbel, stream_keys

_MASK = 2**64 - 1


def splitmix(state: int) -> int:
    """One number of SplitMix64 as its authors write it, with whole numbers of any size."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def by_definition(seed: int, item: int, sample: int, position: int, token: int) -> float:
    step = 0x9E3779B97F4A7C15
    state = splitmix(seed)
    for number in (item, sample, position, token):
        state = splitmix((state + step * number) & _MASK)
    rest = (state >> 33) / 2**31 + 2**-32
    return -math.log(-math.log1p(-rest)) if rest < 1 else -math.inf


def keys(*numbers: tuple[int, int, int]) -> torch.Tensor:
    return stream_keys(*torch.tensor(numbers).unbind(1))


def test_numbers_are_those_of_the_generator() -> None:
    assert splitmix(0) == 0xE220A8397B1DCDAF  # published with the generator
    clips = [(0, 0, 0), (7, 3, 1), (2**62 + 5, 2**40, 9)]
    positions, tokens = [0, 5, 12_799], [0, 1, 63_999]
    found = gumbel(keys(*clips), torch.tensor(positions), torch.tensor(tokens))
    expected = [[[by_definition(*c, p, t) for t in tokens] for p in positions] for c in clips]
    # The number is made from 31 bits, of which float32 keeps 24.
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-6, rtol=2e-6)


def test_a_number_is_of_its_place_alone() -> None:
    three = keys((1, 0, 0), (1, 4, 0), (1, 4, 2))
    tokens = torch.arange(50)
    whole = gumbel(three, torch.arange(10), tokens)
    torch.manual_seed(3)
    assert torch.equal(gumbel(three[1:2], torch.arange(4, 6), tokens), whole[1:2, 4:6])
    some = torch.tensor([[[3, 40]], [[0, 1]], [[7, 7]]])
    rows = gumbel(three, torch.tensor([[2], [0], [9]]), some)
    assert torch.equal(rows[0, 0], whole[0, 2, [3, 40]])
    assert torch.equal(rows[2, 0], whole[2, 9, [7, 7]])
    others = [keys(c) for c in ((2, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 0))]
    for other in others:
        assert not torch.equal(gumbel(other, torch.arange(10), tokens), whole[:1])


def test_numbers_are_gumbel_and_independent() -> None:
    found = gumbel(keys((0, 0, 0)), torch.arange(200), torch.arange(1000))[0].double()
    assert found.isfinite().all()
    # 200,000 draws: five standard deviations of the mean are 0.015, of the variance 0.06.
    assert abs(float(found.mean()) - 0.57722) < 0.015
    assert abs(float(found.var()) - math.pi**2 / 6) < 0.06
    below = (found < 1).double().mean()
    assert abs(float(below) - math.exp(-math.exp(-1))) < 0.006
    centred = (found - found.mean()) / found.std()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll((1, 1), (0, 1))):
        assert abs(float((centred * other).mean())) < 5 / math.sqrt(200_000)
