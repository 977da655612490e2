"""The choice of windows: wide where drafts are right, none where they are not, and back again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from cosmos_posttrain.inference.windows import WindowChoice

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def sizes(choice: WindowChoice, rate: Callable[[int], float], num_passes: int = 120) -> list[int]:
    """Windows of some passes, each of which makes ``rate`` of the window known."""
    found = []
    for _ in range(num_passes):
        size = choice.next()
        found.append(size)
        choice.learn([max(1, round(rate(size)))] * 2)
    return found


def test_windows_grow_where_drafts_are_right() -> None:
    # The rates of a small world, in tokens a pass (docs/decoding.md).
    world = {1: 1, 2: 2, 4: 3, 8: 4, 16: 6, 32: 10, 64: 13}.__getitem__
    found = sizes(WindowChoice(1, CPU, 64), world)
    # 10 tokens for 2.6 times the time of one are better than 13 for 3.7 times.
    assert found[0] == 32 and found[-80:] == [32] * 80
    assert 64 in found
    assert sizes(WindowChoice(1, CPU, 13), world)[-1] == 8  # no more than there is room for
    assert sizes(WindowChoice(1, GPU, 64), lambda size: size**0.5)[-1] == 64


def test_drafts_that_do_not_pay_are_left_and_tried_again() -> None:
    choice = WindowChoice(1, CPU, 64)
    found = sizes(choice, lambda size: 1, 600)
    assert found[0] == 32 and found[7:100] == [1] * 93
    # What trying costs, in passes' time: less than 4%.
    assert found.count(8) and 600 - found.count(1) <= 24
    assert sizes(choice, lambda size: 0.9 * size, 400)[-1] == 64


def test_a_window_in_between() -> None:
    # Never more than four tokens a pass.
    assert sizes(WindowChoice(1, CPU, 64), lambda size: min(size, 4))[-1] == 4


def test_a_batch_has_less_room() -> None:
    one, many = (
        sizes(WindowChoice(size, CPU, 64), lambda size: size**0.5, 300)[-60:] for size in (1, 32)
    )
    assert max(one) > max(many) and many.count(1) > 40


def test_a_given_window_stays() -> None:
    assert set(sizes(WindowChoice(1, CPU, 64, 5), lambda size: 1)) == {5}
