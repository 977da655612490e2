"""Ways to decode: windows give what one by one gives, from fewer passes, clip by clip."""

from __future__ import annotations

import pytest
import torch
from helpers.fed_tokens import FedTokens

from cosmos_posttrain.inference.decoding import Decoded, decode_in_windows, decode_one_by_one
from cosmos_posttrain.inference.noise import stream_keys
from cosmos_posttrain.inference.sampling import Draw

VOCAB, FRAME = 40, 6


class Repetition(FedTokens):
    """A model that mostly repeats the frame before; what it says depends on all tokens before.

    Scores are sharp unless the sum of all before is a multiple of five.
    """

    def __init__(self, batch_size: int, frame: int = FRAME) -> None:
        super().__init__(batch_size)
        self._frame = frame

    def scores_at(self, seen: torch.Tensor, total: int) -> torch.Tensor:
        scores = torch.arange(VOCAB).add(total).mul(7).remainder(11) / 11
        if total % 5 and len(seen) >= self._frame:
            scores[seen[-self._frame]] += 6
        return scores


def prompts(batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB, (batch_size, FRAME), generator=generator)


def draw_of(batch_size: int, temperature: float) -> Draw:
    zeros = torch.zeros(batch_size, dtype=torch.long)
    return Draw(stream_keys(zeros, torch.arange(batch_size), zeros), 0, temperature, 0.9)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("window", [None, 2, 5, 7, 100])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_give_what_one_by_one_gives(
    temperature: float, window: int | None, batch_size: int
) -> None:
    given, draw = prompts(batch_size), draw_of(batch_size, temperature)
    plain = Repetition(batch_size)
    expected = decode_one_by_one(plain, given, 45, draw)
    assert plain.num_passes == 45
    model = Repetition(batch_size)
    seen: list[Decoded] = []
    counts: list[int] = []
    found = decode_in_windows(
        model, given, 45, draw, window, FRAME, progress=counts.append, observe=seen.append
    )
    assert torch.equal(found, expected)
    assert model.num_passes < 40
    assert counts[-1] == 45 and counts == sorted(counts)
    # What is observed is every token once, in order, with the scores that it was drawn from.
    for clip in range(batch_size):
        parts = [part for part in seen if clip in part.clips]
        assert sum(part.tokens.shape[1] for part in parts) == 45
        for part in parts:
            row = part.clips.index(clip)
            width = part.tokens.shape[1]
            assert torch.equal(part.tokens[row], expected[clip, part.first : part.first + width])
            assert part.scores.shape[1] == width


def test_a_wider_window_needs_fewer_passes() -> None:
    def num_passes(window: int) -> int:
        model = Repetition(1)
        decode_in_windows(model, prompts(1), 60, draw_of(1, 1.0), window, FRAME)
        return model.num_passes

    assert num_passes(2) > num_passes(4) > num_passes(7)


def test_one_token_and_frames_of_one_token() -> None:
    draw = draw_of(1, 1.0)
    for frame, num_tokens in ((FRAME, 1), (1, 9), (1, 1)):
        expected = decode_one_by_one(Repetition(1, frame), prompts(1), num_tokens, draw)
        found = decode_in_windows(Repetition(1, frame), prompts(1), num_tokens, draw, 8, frame)
        assert torch.equal(found, expected)


def test_each_clip_is_what_it_is_alone() -> None:
    given, draw = prompts(4), draw_of(4, 1.0)
    together = decode_in_windows(Repetition(4), given, 30, draw, 7, FRAME)
    for clip in range(4):
        own = Draw(draw.keys[clip : clip + 1], 0, 1.0, 0.9)
        alone = decode_in_windows(Repetition(1), given[clip : clip + 1], 30, own, 7, FRAME)
        assert torch.equal(alone[0], together[clip])


# Of a batch, chance makes some drafts right, and rows cost less.
@pytest.mark.parametrize(("batch_size", "least"), [(1, 71), (3, 40)])
def test_where_drafts_are_wrong_it_goes_one_by_one(batch_size: int, least: int) -> None:
    given, draw = prompts(batch_size), draw_of(batch_size, 0.0)
    expected = decode_one_by_one(Repetition(batch_size, frame=10_000), given, 90, draw)
    model, seen = Repetition(batch_size, frame=10_000), []
    found = decode_in_windows(model, given, 90, draw, None, FRAME, observe=seen.append)
    assert torch.equal(found, expected)
    assert least <= model.num_passes <= 90
    assert sum(part.scores.shape[1] * len(part.clips) for part in seen) == 90 * batch_size
