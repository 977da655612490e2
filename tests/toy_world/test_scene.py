"""What a small world shows: motion, pushes, captions, and pixels that agree with the truth."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations

import numpy as np
import pytest
from helpers.small_world import HEIGHT, WIDTH, clips, scene, settings, world_object

from cosmos_posttrain.evaluation.positions import direction_name
from cosmos_posttrain.toy_world.config import ACTION_SCALE, LEVELS, SHAPES
from cosmos_posttrain.toy_world.folder import ClipId
from cosmos_posttrain.toy_world.render import render
from cosmos_posttrain.toy_world.scene import EXTENTS, draw_scene
from cosmos_posttrain.toy_world.write import RenderedClip, annotation, make_clip

WAYS = ("left", "right", "up", "down")


def middle_of_what_is_bright(frame: np.ndarray, near: np.ndarray, reach: float) -> np.ndarray:
    """(x, y) of what is brighter than the ground around a place."""
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    brightness = np.maximum(frame.max(-1).astype(float) - np.median(frame), 0)
    weights = brightness * (np.maximum(np.abs(x - near[0]), np.abs(y - near[1])) < reach + 3)
    return np.array([(weights * x).sum(), (weights * y).sum()]) / weights.sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_pixels_agree_with_the_truth(shape: str) -> None:
    for clip in clips(6, shapes=shape):
        reach = clip.truth.diameters[0] / 2 * EXTENTS[shape]
        for frame, (place,) in zip(clip.frames, clip.truth.positions, strict=True):
            # Edges are smooth; what is left is the noise of the ground around the object.
            middle = middle_of_what_is_bright(frame, place, reach)
            assert np.abs(middle - place).max() < 0.25


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_has_the_area_of_its_disc(shape: str) -> None:
    frames, visible = render(
        scene([world_object("white", 30, shape)], [[(80.3, 47.6)]]), HEIGHT, WIDTH, "calm"
    )
    area = np.pi * 15**2
    assert visible[0, 0] == pytest.approx(1, abs=0.01)
    assert (frames[0].min(-1) > 120).sum() == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("level", LEVELS)
def test_steps_add_the_velocity_except_at_walls_and_pushes(level: str) -> None:
    walls = 0
    for clip in clips(8, level=level):
        truth = clip.truth
        steps = np.diff(truth.positions, axis=0)
        for number in range(len(truth.objects)):
            push = ACTION_SCALE * clip.actions[:, 2 * number : 2 * number + 2]
            missed = np.abs(steps[:, number] - truth.velocities[:-1, number] - push).max(1) > 1e-6
            walls += missed.sum()
            if level == "simple":
                assert not missed.any()
    assert walls > 0 or level in ("simple", "pushed")


def test_a_simple_clip_goes_straight_on_and_stays_in_the_picture() -> None:
    for clip in clips(40):
        steps = np.diff(clip.truth.positions[:, 0], axis=0)
        assert np.abs(steps - steps[0]).max() < 1e-9
        assert 1.5 <= np.hypot(*steps[0]) <= 3
        assert np.count_nonzero(np.abs(steps[0]) > 1e-6) == 1
        assert clip.truth.visible.min() > 0.99
        assert not clip.actions.any()


def test_after_eight_frames_directions_lie_far_apart() -> None:
    slowest = settings().speed[0]
    ends = [8 * slowest * np.array(way) for way in ((-1, 0), (1, 0), (0, -1), (0, 1))]
    assert min(np.hypot(*(a - b)) for a, b in combinations(ends, 2)) >= 16


def test_still_frames_are_still_and_then_things_move() -> None:
    for clip in clips(10, level="rich", still_frames=9):
        assert (clip.frames[:9] == clip.frames[0]).all()
        assert (clip.frames[9] != clip.frames[8]).any()
        assert not clip.truth.velocities[:9].any()
        assert not clip.actions[:8].any()


def test_still_frames_do_not_tell_the_direction() -> None:
    world = settings(still_frames=9)
    starts = defaultdict(list)
    for number in range(1200):
        made = draw_scene(world, np.random.default_rng([7, number]))
        starts[made.objects[0].direction].append(made.positions[0, 0])
    assert set(starts) == set(WAYS)
    spread = np.std(np.concatenate(list(starts.values())), axis=0)
    for places in starts.values():
        assert 240 < len(places) < 360
        # Four standard errors of a mean of 300.
        offset = np.mean(places, 0) - np.mean(np.concatenate(list(starts.values())), 0)
        assert (np.abs(offset) < 4 * spread / np.sqrt(300)).all()


@pytest.mark.parametrize("still_frames", [9, 0])
def test_still_objects_are_not_placed_by_where_they_will_go(still_frames: int) -> None:
    world = settings(level="bouncing", still_frames=still_frames)
    headings = []
    for number in range(400):
        made = draw_scene(world, np.random.default_rng([8, number]))
        way = made.positions[still_frames + 1] - made.positions[max(still_frames - 1, 0)]
        to_other = made.positions[0, ::-1] - made.positions[0]
        headings += list((way * to_other).sum(1) / np.hypot(*way.T) / np.hypot(*to_other.T))
    error = np.std(headings) / np.sqrt(len(headings))
    # Where motion is seen from the start, objects are placed so that they meet.
    assert abs(np.mean(headings)) < 4 * error if still_frames else np.mean(headings) > 8 * error


def test_the_camera_of_a_long_clip_leaves_room() -> None:
    for still_frames in (0, 9):
        clip = clips(1, level="rich", num_frames=60, diameter="38", still_frames=still_frames)[0]
        assert np.ptp(clip.truth.camera, axis=0).max() <= 24
        assert (clip.truth.visible > 0).any(0).all()
        assert (clip.truth.positions > 0).all()
        assert (clip.truth.positions < [WIDTH - 1, HEIGHT - 1]).all()


def test_still_frames_do_not_tell_where_the_camera_goes() -> None:
    made = [
        draw_scene(settings(level="rich", still_frames=9), np.random.default_rng(number))
        for number in range(5)
    ]
    assert len({one.walls.tobytes() for one in made}) == 1
    assert len({one.camera.tobytes() for one in made}) == 5
    for one in made:
        last = one.camera[-1]
        assert (one.walls[0] >= last).all()
        assert (one.walls[1] <= last + np.array([WIDTH - 1, HEIGHT - 1])).all()


def test_what_is_pushed_moves_as_the_action_says() -> None:
    pushes = 0
    for clip in clips(12, level="pushed"):
        steps = np.diff(clip.truth.positions[:, 0], axis=0)
        push = ACTION_SCALE * clip.actions[:, :2]
        is_pushed = clip.actions[:, 6] == 1
        assert not steps[~is_pushed].any()
        assert not push[~is_pushed].any()
        at_wall = np.abs(steps - push).max(1) > 1e-6
        places = clip.truth.positions[1:, 0]
        to_wall = np.minimum(places, [WIDTH - 1, HEIGHT - 1] - places).min(1)
        assert (to_wall[at_wall] < clip.truth.diameters[0] / 2 + 3).all()
        pushes += (is_pushed & ~at_wall).sum()
    assert pushes > 50


def test_a_push_changes_a_motion_that_lasts() -> None:
    turned = 0
    for clip in clips(6, level="rich", camera="still", num_objects=1, push_probability=0.1):
        velocity = clip.truth.velocities[:, 0]
        for step in np.flatnonzero(clip.actions[:, 6]):
            expected = velocity[step] + ACTION_SCALE * clip.actions[step, :2]
            assert np.abs(np.abs(velocity[step + 1]) - np.abs(expected)).max() < 1e-6
            turned += 1
    assert turned > 5


def test_objects_bounce_and_never_leave() -> None:
    bounced = 0
    for clip in clips(30, level="bouncing"):
        for number, item in enumerate(clip.truth.objects):
            places = clip.truth.positions[:, number]
            reach = item.diameter / 2 * EXTENTS[item.shape]
            assert (places >= reach - 1e-6).all()
            assert (places <= np.array([WIDTH - 1, HEIGHT - 1]) - reach + 1e-6).all()
            bounced += (np.diff(np.sign(clip.truth.velocities[:, number]), axis=0) != 0).any()
    assert bounced > 10


def test_the_first_object_hides_the_others() -> None:
    objects = [world_object("white"), world_object("red")]
    together = scene(objects, [[(60, 50), (60, 50)], [(60, 50), (74, 50)], [(60, 50), (110, 50)]])
    frames, visible = render(together, HEIGHT, WIDTH, "calm")
    assert frames[0, 50, 60].min() > 180  # white in front
    assert visible[:, 0] == pytest.approx([1, 1, 1], abs=0.01)
    # Two discs whose centres are a radius apart share 0.391 of their area.
    assert visible[:, 1] == pytest.approx([0, 1 - 0.391, 1], abs=0.03)


def test_clips_with_several_objects_hide_some() -> None:
    hidden = [clip.truth.visible.min() < 0.8 for clip in clips(30, level="bouncing")]
    assert 3 <= sum(hidden) <= 27


def test_the_camera_moves_over_the_ground() -> None:
    places = np.array([[(80.0, 50.0)], [(80.0, 50.0)]])
    frames, _ = render(
        scene([world_object("blue")], places, camera=[(0, 0), (5, 3)]), HEIGHT, WIDTH, "textured"
    )
    assert (frames[1, :-3, :-5] == frames[0, 3:, 5:]).all()
    moving = clips(3, level="rich")
    assert all(np.ptp(clip.truth.camera, axis=0).max() > 3 for clip in moving)


def way_of(clip: RenderedClip) -> str:
    return direction_name(clip.truth.positions[-1, 0] - clip.truth.positions[0, 0])


def test_the_caption_names_the_object_and_its_direction() -> None:
    words = {
        "up": ("up", "top"),
        "down": ("down", "bottom"),
        "left": ("left",),
        "right": ("right",),
    }
    made = clips(60, shapes="ball,box,diamond")
    for clip in made:
        text, item = clip.truth.caption.lower(), clip.truth.objects[0]
        assert f"{item.color} {item.shape}" in text
        named = [way for way in WAYS if any(word in text for word in words[way])]
        assert named == [way_of(clip)] == [item.direction]
    assert set(Counter(way_of(clip) for clip in made)) == set(WAYS)


def test_captions_come_in_many_wordings() -> None:
    one_thing = clips(150, colors="red")
    to_the_left = {clip.truth.caption for clip in one_thing if way_of(clip) == "left"}
    assert len(to_the_left) > 15
    assert all(text[0].isupper() and text.endswith(".") for text in to_the_left)
    assert not any("a orange" in clip.truth.caption.lower() for clip in clips(40, colors="orange"))


def test_the_caption_of_a_rich_clip_names_everything_that_moves() -> None:
    for clip in clips(10, level="rich"):
        text = clip.truth.caption
        assert all(f"{item.color} {item.shape}" in text for item in clip.truth.objects)
        assert all(item.direction.split()[-1] for item in clip.truth.objects)
        assert "camera" in text or "view" in text


@pytest.mark.parametrize("level", LEVELS)
def test_a_clip_depends_on_settings_seed_split_and_number_alone(level: str) -> None:
    world = settings(level=level)
    first, again = (make_clip(world, 3, ClipId("val", 5)) for _ in range(2))
    assert (first.frames == again.frames).all()
    assert first.truth.caption == again.truth.caption
    for other in (make_clip(world, 4, ClipId("val", 5)), make_clip(world, 3, ClipId("test", 5))):
        assert (other.frames != first.frames).any()


def test_the_annotation_agrees_with_the_truth() -> None:
    clip = clips(1, level="rich", push_probability=0.3)[0]
    note = annotation(ClipId("train", 0), clip)
    state = np.array(note["state"])
    assert state.shape == (17, 7)
    places = state[:, :6].reshape(17, 3, 2) * [WIDTH, HEIGHT]
    assert np.abs(places - clip.truth.positions).max() < 1e-3
    assert np.array(note["action"]).shape == (16, 7)
    assert note["continuous_gripper_state"][:16] == [row[6] for row in note["action"]]
    assert 0 < sum(note["continuous_gripper_state"]) < 16


@pytest.mark.parametrize(("num_objects", "rest"), [(1, 4), (2, 2)])
def test_state_and_action_of_fewer_objects_end_in_zeros(num_objects: int, rest: int) -> None:
    clip = clips(1, level="rich", num_objects=num_objects, push_probability=0.5)[0]
    note = annotation(ClipId("train", 0), clip)
    for rows in (np.array(note["state"]), np.array(note["action"])):
        assert not rows[:, 6 - rest : 6].any()
        assert rows[:, : 6 - rest].any(0).all()
