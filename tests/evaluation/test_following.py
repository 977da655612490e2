"""Directions that clips take, errors in their last frame, and intervals of shares."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers.small_world import clips

from cosmos_posttrain.evaluation.following import (
    Share,
    chance_interval,
    directions_taken,
    follows,
    last_errors,
    locate,
    yardsticks,
)

NUM_GIVEN = 9
STEPS = 8
DIAGONAL = np.hypot(96, 160)


def test_true_clips_follow_their_own_captions_and_no_other() -> None:
    directions = set()
    for clip in clips(8, level="simple", still_frames=NUM_GIVEN):
        (item,) = clip.truth.objects
        found = locate(clip.frames, clip.truth)
        directions.add(item.direction)
        assert directions_taken(found, clip.truth, NUM_GIVEN) == [item.direction]
        for wanted in ("left", "right", "up", "down", ""):
            expected = wanted == item.direction
            assert follows(found, clip.truth, [wanted], NUM_GIVEN) is expected
        assert last_errors(found, clip.truth)[0] < 0.5
    assert len(directions) > 2


def test_an_object_that_is_not_found_follows_nothing() -> None:
    (clip,) = clips(1, level="simple", still_frames=NUM_GIVEN)
    frames = clip.frames.copy()
    frames[-1] = np.median(frames[0], axis=(0, 1))
    found = locate(frames, clip.truth)
    assert np.isfinite(found[:-1]).all()
    assert directions_taken(found, clip.truth, NUM_GIVEN) == [""]
    # Not even where nothing should move.
    assert not follows(found, clip.truth, [""], NUM_GIVEN)
    assert last_errors(found, clip.truth)[0] == pytest.approx(DIAGONAL)


def test_every_object_must_follow() -> None:
    (clip,) = clips(1, level="simple", still_frames=NUM_GIVEN)
    places = np.repeat(clip.truth.positions, 2, axis=1)
    truth = dataclasses.replace(clip.truth, positions=places)
    ways = directions_taken(places, truth, NUM_GIVEN)
    assert follows(places, truth, ways, NUM_GIVEN)
    places = places.copy()
    places[-1, 1] = places[0, 1]
    assert not follows(places, truth, ways, NUM_GIVEN)


def test_yardsticks_repeat_or_go_on() -> None:
    (clip,) = clips(1, level="simple")
    errors = yardsticks(clip.truth, NUM_GIVEN)
    speed = np.hypot(*clip.truth.velocities[0, 0])
    assert errors["repeat"] == pytest.approx([STEPS * speed], abs=0.01)
    assert errors["extrapolate"] == pytest.approx([0], abs=0.01)
    # A clip that stood still until the last given frame tells nothing of where it goes.
    (clip,) = clips(1, level="simple", still_frames=NUM_GIVEN)
    errors = yardsticks(clip.truth, NUM_GIVEN)
    assert errors["extrapolate"] == pytest.approx(errors["repeat"])


def test_intervals_of_shares() -> None:
    assert Share(54, 60).value == 0.9
    # Newcombe 1998, table I: Wilson's method without correction, 95%.
    assert Share(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert Share(15, 148).interval == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert Share(0, 20).interval == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert Share(29, 29).interval == pytest.approx((0.8830, 1.0), abs=1e-4)


def test_chance_lies_about_the_share_of_equal_names() -> None:
    names = ["left", "right", "up", "down"] * 15
    low, high = chance_interval(names, names)
    assert 0.12 < low < 0.18 < 0.32 < high < 0.38
    assert (low, high) == chance_interval(names, names)
    # What never goes anywhere agrees with nothing.
    assert chance_interval([""] * 60, names) == (0.0, 0.0)
