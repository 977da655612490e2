"""What a clip shows: objects, where they are in every frame, and the pushes that they get.

Flows in: settings and a generator of random numbers. Flows out: a ``Scene`` in world coordinates:
pixels, x to the right and y down, the first frame's first pixel at (0, 0).

From frame to frame an object gets its push, moves by the velocity that it then has, is turned back
by walls, and loses ``friction`` of its velocity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.evaluation.positions import direction_name
from cosmos_posttrain.evaluation.world_truth import WorldObject
from cosmos_posttrain.toy_world.config import (
    ACTION_SCALE,
    MAX_OBJECTS,
    MAX_TRAVEL,
    PALETTE,
    WorldSettings,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

NUM_ACTIONS = 2 * MAX_OBJECTS + 1
# From the centre to the side of a box, and to a tip of a diamond, of the area of a unit disc.
EXTENTS = {"ball": 1.0, "box": math.sqrt(math.pi) / 2, "diamond": math.sqrt(math.pi / 2)}
# In pixels a frame: slow, so that the walls leave room.
_CAMERA_SPEED = (0.3, 0.9)
_PLACING_TRIES, _MEETING_TRIES = 50, 6
_MIN_SPEED = 1e-6


@dataclass(frozen=True)
class Scene:
    """One clip: T frames, K objects, the first in front.

    Attributes:
        objects: K of them.
        positions: (T, K, 2) float64 centres.
        velocities: (T, K, 2) float64, what the next step adds where nothing comes between.
        camera: (T, 2) float64, the place of the picture's first pixel.
        camera_direction: as an object's; "" where it stays.
        walls: (2, 2) float64, the least and largest (x, y) of the ground between them.
        actions: (T - 1, 7) float64: for each of three objects the push between two frames, x and y
            in ``ACTION_SCALE`` pixels a frame; then 1 where there is one.
        look_seed: of textures.
    """

    objects: tuple[WorldObject, ...]
    positions: Array
    velocities: Array
    camera: Array
    camera_direction: str
    walls: Array
    actions: Array
    look_seed: int


def draw_scene(settings: WorldSettings, rng: np.random.Generator) -> Scene:
    """Draws one clip."""
    objects = _draw_objects(settings, rng)
    velocities = np.array([_draw_velocity(settings, rng) for _ in objects])
    if settings.friction == 1:
        velocities[:] = 0  # what does not keep its velocity does not set out either
    objects = tuple(
        replace(item, direction=direction_name(velocity, settings.directions, _MIN_SPEED))
        for item, velocity in zip(objects, velocities, strict=True)
    )
    camera, camera_velocity = _draw_camera(settings, rng)
    walls = _build_walls(settings, camera)
    reach = np.array([item.diameter / 2 * EXTENTS[item.shape] for item in objects])[:, None]
    limits = np.stack([walls[0] + reach, walls[1] - reach])
    starts = _draw_starts(settings, velocities, limits, reach, rng)
    positions, carried, actions = _simulate(settings, starts, velocities, limits, rng)
    moves = np.diff(camera, axis=0, append=camera[-1:] + camera_velocity)
    if settings.still_frames > 1:
        moves[settings.still_frames - 1] = 0
    return Scene(
        objects,
        positions,
        carried - moves[:, None],
        camera,
        direction_name(camera_velocity, "8", _MIN_SPEED),
        walls,
        actions,
        int(rng.integers(2**62)),
    )


def _draw_objects(settings: WorldSettings, rng: np.random.Generator) -> tuple[WorldObject, ...]:
    colors = rng.choice(len(settings.colors), settings.num_objects, replace=False)
    names = [settings.colors[number] for number in colors]
    return tuple(
        WorldObject(
            name,
            PALETTE[name],
            settings.shapes[int(rng.integers(len(settings.shapes)))],
            round(float(rng.uniform(*settings.diameter)), 2),
            "",
        )
        for name in names
    )


def _draw_velocity(settings: WorldSettings, rng: np.random.Generator) -> Array:
    """(2,) pixels a frame."""
    turns = float(rng.random())
    if settings.directions != "any":
        number = int(settings.directions)
        turns = math.floor(turns * number) / number
    speed = rng.uniform(*settings.speed)
    return speed * np.round([math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)], 9)


def _draw_camera(settings: WorldSettings, rng: np.random.Generator) -> tuple[Array, Array]:
    """(T, 2) places, and the velocity (2,)."""
    turns, speed = float(rng.random()), rng.uniform(*_CAMERA_SPEED)
    speed = min(speed, _camera_travel(settings) / max(settings.moving_steps, 1))
    if settings.camera == "still":
        return np.zeros((settings.num_frames, 2)), np.zeros(2)
    velocity = speed * np.array([math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)])
    steps = np.maximum(np.arange(settings.num_frames) - max(settings.still_frames - 1, 0), 0)
    return steps[:, None] * velocity, velocity


def _camera_travel(settings: WorldSettings) -> float:
    """Pixels that the camera moves at most: it leaves room for the objects in long clips too."""
    side = min(settings.height, settings.width)
    return min(_CAMERA_SPEED[1] * settings.moving_steps, MAX_TRAVEL * side)


def _build_walls(settings: WorldSettings, camera: Array) -> Array:
    """(2, 2) the ground that the picture never leaves."""
    picture = np.array([settings.width - 1, settings.height - 1], np.float64)
    if settings.camera == "moving" and settings.still_frames > 1:
        # Walls at equal distances do not tell where the camera will go.
        travel = _camera_travel(settings)
        return np.stack([np.full(2, travel), picture - travel])
    return np.stack([camera.max(0), camera.min(0) + picture])


def _draw_starts(
    settings: WorldSettings,
    velocities: Array,
    limits: Array,
    reach: Array,
    rng: np.random.Generator,
) -> Array:
    """(K, 2) places, apart from one another, from which the way does not reach the walls."""
    way = velocities * (0 if settings.bounces else settings.moving_steps)
    low, high = limits[0] - np.minimum(way, 0), limits[1] - np.maximum(way, 0)
    if settings.still_frames > 1 and way.any():
        # The place must tell neither direction nor speed.
        room = settings.speed[1] * settings.moving_steps
        low, high = limits[0] + room, limits[1] - room
    middle = (low + high) / 2
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    tries = rng.uniform(low, high, (_PLACING_TRIES if len(reach) > 1 else 1, *low.shape))
    apart = [starts for starts in tries if _gap(starts, reach) >= 0]
    if not apart:
        return max(tries, key=lambda starts: _gap(starts, reach))
    if settings.still_frames > 1:
        return apart[0]
    # Of a few such tries the one in which one passes closest behind another.
    apart = apart[:_MEETING_TRIES]
    ways = velocities * np.arange(settings.moving_steps + 1)[:, None, None]
    return min(apart, key=lambda starts: min(_gap(places, reach) for places in starts + ways))


def _gap(places: Array, reach: Array) -> float:
    """Pixels between the two nearest objects, below 0 where they overlap."""
    pairs = combinations(range(len(reach)), 2)
    gaps = (math.dist(places[i], places[j]) - reach[i, 0] - reach[j, 0] for i, j in pairs)
    return min(gaps, default=0.0)


def _simulate(
    settings: WorldSettings,
    starts: Array,
    velocities: Array,
    limits: Array,
    rng: np.random.Generator,
) -> tuple[Array, Array, Array]:
    """Moves the objects from their starts, their centres between the least and largest places.

    Returns:
        Positions (T, K, 2), velocities (T, K, 2) that the next step adds, and actions (T - 1, 7).
    """
    positions = np.repeat(starts[None], settings.num_frames, 0)
    carried = np.zeros_like(positions)
    actions = np.zeros((settings.num_frames - 1, NUM_ACTIONS))
    first, velocity = max(settings.still_frames, 1) - 1, velocities
    if settings.still_frames <= 1:
        carried[0] = velocity  # of the first step after still frames, these tell nothing
    for step in range(first, settings.num_frames - 1):
        pushes = np.array([_draw_push(settings, item, rng) for item in velocity])
        actions[step, : pushes.size] = pushes.ravel()
        actions[step, -1] = float(pushes.any())
        velocity = velocity + ACTION_SCALE * pushes
        place = positions[step] + velocity
        # A wall sends back what would lie behind it.
        turned = np.where(place < limits[0], 2 * limits[0] - place, place)
        turned = np.where(place > limits[1], 2 * limits[1] - place, turned)
        velocity = np.where(turned == place, velocity, -velocity) * (1 - settings.friction)
        positions[step + 1] = np.clip(turned, *limits)
        carried[step + 1] = velocity
    return positions, carried, actions


def _draw_push(settings: WorldSettings, velocity: Array, rng: np.random.Generator) -> Array:
    """(2,) mostly nothing; else what leads to a velocity as one has at the start."""
    is_pushed = rng.random() < settings.push_probability
    wanted = _draw_velocity(settings, rng)
    # Rounded, so that the numbers in the annotation are exactly what happens.
    return np.round((wanted - velocity) / ACTION_SCALE, 6) if is_pushed else np.zeros(2)
