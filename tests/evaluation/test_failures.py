"""The failure detectors on made-up failures, and on clips that are fine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.failing_clips import (
    NUM_FRAMES,
    degraded,
    failing_clips,
    fine_clips,
    intruded,
    pan,
    real_shots,
    small_worlds,
    still,
)

from cosmos_posttrain.evaluation.failures import SOLID_COLOR, SUDDEN_OBJECT, find_defects
from cosmos_posttrain.tokenizer import load_tokenizer
from cosmos_posttrain.video import to_float, to_uint8

GIVEN = (1, 5, 9)


def test_both_kinds_are_found_and_located() -> None:
    rng = np.random.default_rng(0)
    bases, missed = small_worlds(8), []
    for number, clip in enumerate(bases):
        num_given = GIVEN[number % 3]
        assert find_defects(clip, num_given) == []
        for kind, broken in (
            (SOLID_COLOR, degraded(clip, num_given, rng)),
            (SUDDEN_OBJECT, intruded(clip, num_given, rng, bases)),
        ):
            found = {defect.kind: defect for defect in find_defects(broken, num_given)}
            if kind not in found:
                missed.append((number, kind))
                continue
            changed = (broken.float() - clip.float()).abs().amax((0, 2, 3)) > 12
            first = int(changed.nonzero()[0])
            assert first <= found[kind].frame <= first + 5
    assert len(missed) <= 1, missed


def test_what_stands_still_or_moves_with_the_camera_is_fine() -> None:
    rng = np.random.default_rng(1)
    for clip in small_worlds(4):
        assert find_defects(still(clip, rng), 1) == []
        assert find_defects(pan(clip, rng), 5) == []


def test_one_colour_from_the_beginning_is_what_was_asked_for() -> None:
    night = torch.full((3, 9, 48, 80), 20, dtype=torch.uint8)
    assert find_defects(night, 1) == []
    # A flash of one frame is not what the picture has come to.
    clip = small_worlds(1)[0]
    flash = clip.clone()
    flash[:, 12] = 255
    assert SOLID_COLOR not in {defect.kind for defect in find_defects(flash, 9)}
    flash[:, 12:14] = 255
    assert SOLID_COLOR in {defect.kind for defect in find_defects(flash, 9)}


def test_a_cut_is_a_failure_and_what_is_given_is_not() -> None:
    first, second = small_worlds(1)[0], 255 - small_worlds(1)[0].flip(2)
    clip = torch.cat([first[:, :6], second[:, 6:]], 1)
    assert [(d.kind, d.frame) for d in find_defects(clip, 5)] == [(SUDDEN_OBJECT, 6)]
    assert find_defects(clip, 9) == []


def test_no_frame_is_generated_without_one() -> None:
    assert find_defects(small_worlds(1)[0][:, :1], 1) == []


@pytest.mark.slow
def test_of_200_failures_most_are_found_and_of_200_fine_clips_few_flagged() -> None:
    if not real_shots():
        pytest.skip("no real clips: pip install '.[samples]'")
    fine, broken = fine_clips(200, seed=0), failing_clips(200, seed=10)
    flagged = [n for n, clip in enumerate(fine) if find_defects(clip, GIVEN[n % 3])]
    assert len(flagged) <= 4, flagged
    missed = [
        (number, kind)
        for number, (kind, clip, num_given) in enumerate(broken)
        if kind not in {defect.kind for defect in find_defects(clip, num_given)}
    ]
    assert len(missed) <= 10, missed


@pytest.mark.slow
def test_what_a_tokenizer_does_to_a_clip_is_no_failure() -> None:
    """Generated clips come through a tokenizer, with its blur and flicker."""
    tokenizer = load_tokenizer("tiny-dv8x16x16", device="cpu")
    flagged = 0
    for clip in fine_clips(50, seed=20):
        assert clip.shape[1] == NUM_FRAMES
        coded = to_uint8(tokenizer.decode(tokenizer.encode(to_float(clip)[None])))[0]
        flagged += bool(find_defects(coded, 5))
    assert flagged <= 1
