"""Small worlds for tests: a few clips of a level, and scenes made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np

from cosmos_posttrain.evaluation.world_truth import WorldObject
from cosmos_posttrain.toy_world.config import PALETTE, ToyWorldConfig, WorldSettings, validate
from cosmos_posttrain.toy_world.folder import ClipId
from cosmos_posttrain.toy_world.scene import NUM_ACTIONS, Scene
from cosmos_posttrain.toy_world.write import RenderedClip, make_clip

HEIGHT, WIDTH = 96, 160


def settings(**values: Any) -> WorldSettings:
    """The settings that flags of these names give."""
    return validate(ToyWorldConfig(output="anywhere", **values))


def clips(count: int, **values: Any) -> list[RenderedClip]:
    """The first training clips of a world with these flags."""
    return [make_clip(settings(**values), 0, ClipId("train", number)) for number in range(count)]


def world_object(color: str, diameter: float = 28.0, shape: str = "ball") -> WorldObject:
    """An object of the palette."""
    return WorldObject(color, PALETTE[color], shape, diameter, "")


def scene(objects: list[WorldObject], positions: Any, camera: Any = None) -> Scene:
    """Objects at given places (T, K, 2) of the world, the first in front; nothing is pushed."""
    places = np.asarray(positions, np.float64)
    views = np.zeros((len(places), 2)) if camera is None else np.asarray(camera, np.float64)
    return Scene(
        tuple(objects),
        places,
        np.zeros_like(places),
        views,
        "",
        np.array([[-1000.0, -1000.0], [1000.0, 1000.0]]),
        np.zeros((len(places) - 1, NUM_ACTIONS)),
        0,
    )
