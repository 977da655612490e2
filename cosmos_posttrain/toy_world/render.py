"""A scene in pixels.

Flows in: a ``Scene`` and the picture's size. Flows out: frames (T, H, W, 3) uint8, and which share
of each object is visible. Edges are smooth, so a centre between two pixels stays where it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.toy_world.scene import EXTENTS, Scene

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cosmos_posttrain.evaluation.world_truth import WorldObject

    Array = NDArray[np.float64]

_GROUND_LEVEL = 45.0
_TONE = 3.0
# (size in pixels, strength in grey levels) of the ground's layers of noise.
_LAYERS = {"calm": ((22.0, 5.0),), "textured": ((22.0, 5.0), (7.0, 5.0))}
_TILE, _TILE_STRENGTH = 20.0, 5.0
_WALL_BRIGHTNESS = 0.4
_SHADE, _STRIPES = 0.10, 0.07


def render(scene: Scene, height: int, width: int, ground: str) -> tuple[NDArray[np.uint8], Array]:
    """Draws a scene.

    Returns:
        Frames (T, H, W, 3) uint8, and (T, K) float64 in [0, 1]: the share of each object that is in
        the picture and not hidden.
    """
    rng = np.random.default_rng(scene.look_seed)
    surface = _Ground(scene, ground, height, width, rng)
    angles = rng.uniform(0, math.pi, len(scene.objects))
    num_frames = len(scene.positions)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    visible = np.zeros((num_frames, len(scene.objects)))
    for number in range(num_frames):
        picture = surface.at(scene.camera[number])
        uncovered = np.ones((height, width))
        places = scene.positions[number] - scene.camera[number]
        covers: list[tuple[tuple[slice, slice], Array, Array]] = []
        for item, place, angle in zip(scene.objects, places, angles, strict=True):
            window, cover, colors = _draw(item, place, float(angle), height, width)
            shown = cover * uncovered[window]
            visible[number, len(covers)] = shown.sum() / (math.pi * item.diameter**2 / 4)
            uncovered[window] *= 1 - cover
            covers.append((window, shown, colors))
        picture *= uncovered[..., None]
        for window, shown, colors in covers:
            picture[window] += shown[..., None] * colors
        frames[number] = np.clip(picture + 0.5, 0, 255).astype(np.uint8)
    return frames, np.minimum(visible, 1.0)


def _draw(
    item: WorldObject, place: Array, angle: float, height: int, width: int
) -> tuple[tuple[slice, slice], Array, Array]:
    """The window of the picture that an object may touch, its cover (h, w), colours (h, w, 3)."""
    radius = item.diameter / 2
    extent = radius * EXTENTS[item.shape]
    columns, rows = (
        slice(max(math.floor(middle - extent), 0), min(math.ceil(middle + extent) + 1, size))
        for middle, size in zip(place, (width, height), strict=True)
    )
    x = np.arange(columns.start, columns.stop) - place[0]
    y = (np.arange(rows.start, rows.stop) - place[1])[:, None]
    if item.shape == "ball":
        outside = np.hypot(x, y) - extent
    elif item.shape == "box":
        outside = np.maximum(np.abs(x), np.abs(y)) - extent
    else:
        outside = (np.abs(x) + np.abs(y) - extent) / math.sqrt(2)
    cover = np.clip(0.5 - outside, 0, 1)
    stripes = np.cos(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / (0.7 * radius))
    light = 1 - _SHADE * (x**2 + y**2) / radius**2 + _STRIPES * (stripes - 1)
    return (rows, columns), cover, light[..., None] * np.array(item.rgb, np.float64)


class _Ground:
    """The ground, and what lies behind the walls, from any place of the camera."""

    def __init__(
        self, scene: Scene, kind: str, height: int, width: int, rng: np.random.Generator
    ) -> None:
        self._tone = _GROUND_LEVEL + rng.uniform(-_TONE, _TONE, 3)
        self._first = np.floor(scene.camera.min(0))
        reach = np.ceil(scene.camera.max(0)) - self._first + [width, height]
        self._layers = [
            (size, rng.uniform(-strength, strength, [math.ceil(n / size) + 2 for n in reach[::-1]]))
            for size, strength in _LAYERS[kind]
        ]
        self._has_tiles = kind == "textured"
        self._walls = scene.walls
        self._size = (height, width)
        self._last: tuple[tuple[float, ...], Array] | None = None

    def at(self, camera: Array) -> Array:
        """(H, W, 3) float64, a fresh array."""
        key = tuple(camera)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._paint(camera))
        return self._last[1].copy()

    def _paint(self, camera: Array) -> Array:
        height, width = self._size
        x, y = np.arange(width) + camera[0], np.arange(height) + camera[1]
        level = np.zeros(self._size)
        for size, values in self._layers:
            level += _interpolate(values, (y - self._first[1]) / size, (x - self._first[0]) / size)
        if self._has_tiles:
            wave_x, wave_y = (np.clip(3 * np.sin(math.pi * v / _TILE), -1, 1) for v in (x, y))
            level += _TILE_STRENGTH * wave_x * wave_y[:, None]
        inside = _between(x, *self._walls[:, 0]) * _between(y, *self._walls[:, 1])[:, None]
        picture = self._tone + level[..., None]
        return picture * (_WALL_BRIGHTNESS + (1 - _WALL_BRIGHTNESS) * inside)[..., None]


def _interpolate(values: Array, rows: Array, columns: Array) -> Array:
    """Smooth noise: values (n, m) of a grid at every pair of fractional rows and columns."""
    i, j = rows.astype(int), columns.astype(int)
    u, v = rows - i, columns - j
    u, v = (u * u * (3 - 2 * u))[:, None], v * v * (3 - 2 * v)
    upper = values[i][:, j] * (1 - v) + values[i][:, j + 1] * v
    lower = values[i + 1][:, j] * (1 - v) + values[i + 1][:, j + 1] * v
    return upper * (1 - u) + lower * u


def _between(values: Array, low: float, high: float) -> Array:
    """1 from low to high, 0 outside, with edges of a pixel."""
    return np.clip(np.minimum(values - low, high - values) + 1, 0, 1)
