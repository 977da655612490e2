"""Batches made ahead: the same ones, no earlier than needed, errors in their place."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from cosmos_posttrain.data.batch import Batch
from cosmos_posttrain.data.prefetch import prefetched


def _batches(made: list[int], num: int | None = None) -> Iterator[list[Batch]]:
    number = 0
    while num is None or number < num:
        made.append(number)
        tokens = torch.full((1, 3), number)
        yield [Batch(tokens, tokens, tokens.float())]
        number += 1


def test_the_same_batches_in_the_same_order() -> None:
    found = [int(batch[0].tokens[0, 0]) for batch in prefetched(_batches([], 5))]
    assert found == [0, 1, 2, 3, 4]


def test_one_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    batches = prefetched(_batches(made))
    for number in range(3):
        assert int(next(batches)[0].tokens[0, 0]) == number
        assert len(made) <= number + 2
    batches.close()  # type: ignore[attr-defined]
    assert made == [0, 1, 2, 3]
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]


def test_an_error_comes_where_its_batch_would() -> None:
    def failing() -> Iterator[list[Batch]]:
        yield from _batches([], 2)
        raise ValueError("shard 7 is gone")

    batches = prefetched(failing())
    next(batches), next(batches)
    with pytest.raises(ValueError, match="shard 7"):
        next(batches)
