"""The choice of windows: wide where drafts are right, none where they are not, and back again."""

from __future__ import annotations

import torch

from cosmos_posttrain.inference.windows import WindowChoice

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def sizes(choice: WindowChoice, num_right: list[int], num_passes: int = 60) -> list[int]:
    """Windows of some passes in which so many drafts of each clip are right, if so many are fed."""
    found = []
    for _ in range(num_passes):
        size = choice.next()
        found.append(size)
        choice.learn([min(count, size - 1) for count in num_right], size - 1)
    return found


def test_windows_grow_where_drafts_are_right() -> None:
    assert sizes(WindowChoice(1, CPU, 64), [60])[-1] == 64
    assert sizes(WindowChoice(1, CPU, 13), [60])[-1] == 13  # no more than there is room for
    assert sizes(WindowChoice(1, CPU, 64), [3])[-1] == 4


def test_drafts_that_do_not_pay_are_left_and_tried_again() -> None:
    choice = WindowChoice(1, CPU, 64)
    found = sizes(choice, [0], 120)
    assert found[1] == 1
    assert 90 <= found.count(1) < 120
    assert sizes(choice, [60], 400)[-1] == 64
    # A GPU has rows to spare.
    assert sizes(WindowChoice(1, GPU, 64), [1])[-1] > 1


def test_a_batch_has_less_room() -> None:
    one, many = (sizes(WindowChoice(size, CPU, 64), [2] * size)[-1] for size in (1, 32))
    assert one > many


def test_a_given_window_stays() -> None:
    assert set(sizes(WindowChoice(1, CPU, 64, 5), [0])) == {5}
