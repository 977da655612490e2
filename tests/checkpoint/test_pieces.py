"""Ranges of a tensor's numbers as boxes of it."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from cosmos_posttrain.checkpoint.pieces import boxes


@pytest.mark.parametrize("shape", [(7,), (5, 4), (1, 6), (6, 1), (3, 4, 5), (2, 3, 2, 3)], ids=str)
def test_every_range_becomes_a_few_boxes_in_its_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(prod(shape)).reshape(shape)
    ends = range(numbers.numel() + 1)
    ranges = [(a, b) for a in ends for b in ends if a <= b]
    for start, stop in random.Random(0).sample(ranges, min(len(ranges), 300)):
        found = list(boxes(shape, start, stop))
        # At most a beginning and an end on each axis but the last, and what is whole between them.
        assert len(found) <= 2 * len(shape) - 1
        assert all(min(sizes) > 0 for _, sizes in found)
        cut = [
            numbers[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].flatten()
            for box in found
        ]
        assert torch.cat([numbers[:0].flatten(), *cut]).tolist() == list(range(start, stop))


def test_a_range_of_whole_rows_is_one_box() -> None:
    assert list(boxes((8, 100), 200, 700)) == [((2, 0), (5, 100))]
    assert list(boxes((8, 100), 250, 730)) == [
        ((2, 50), (1, 50)),
        ((3, 0), (4, 100)),
        ((7, 0), (1, 30)),
    ]
