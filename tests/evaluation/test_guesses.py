"""Continuations without a model, and the Sampson error, on motions that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos_posttrain.evaluation.generation.guesses import constant_motion, repeat_last_frame
from cosmos_posttrain.evaluation.generation.sampson import distances, sampson_error

HEIGHT, WIDTH = 96, 128


def texture(seed: int = 0, height: int = 2 * HEIGHT, width: int = 2 * WIDTH) -> Tensor:
    """(3, H, W) uint8: smooth random spots."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 6, width // 6, generator=generator) * 255
    size = (height, width)
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0].clamp(0, 255).byte()


def panned(num_frames: int, right: int, down: int) -> Tensor:
    """(3, T, H, W): the picture's content moves so many pixels a frame."""
    large = texture()
    frames = []
    for t in range(num_frames):
        top, left = HEIGHT // 2 - down * t, WIDTH // 2 - right * t
        frames.append(large[:, top : top + HEIGHT, left : left + WIDTH])
    return torch.stack(frames, 1)


def test_what_stands_still_goes_on_standing_still() -> None:
    clip = panned(3, 0, 0)
    whole = panned(6, 0, 0)
    assert torch.equal(repeat_last_frame(clip, 6), whole)
    difference = constant_motion(clip, 6).float() - whole.float()
    assert difference.abs().max() <= 2


@pytest.mark.parametrize(("right", "down"), [(3, 0), (-2, 1), (0, -3)])
def test_motion_goes_on_in_its_direction(right: int, down: int) -> None:
    whole = panned(7, right, down)
    guess = constant_motion(whole[:, :3], 7)
    assert guess.shape == whole.shape and guess.dtype == torch.uint8
    assert torch.equal(guess[:, :3], whole[:, :3])
    inside = (slice(None), -1, slice(16, -16), slice(16, -16))
    moved = (guess[inside].float() - whole[inside].float()).abs().mean()
    stayed = (repeat_last_frame(whole[:, :3], 7)[inside].float() - whole[inside].float()).abs()
    assert moved < 0.25 * stayed.mean()


def test_sampson_distances_are_pixels_from_the_epipolar_line() -> None:
    # A camera that moves sideways: every point stays in its row, and F is that of a shift in x.
    matrix = np.array([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    points = np.array([[10.0, 20], [30, 5], [7, 7]])
    others = points + np.array([[4, 0], [9, 2], [1, -1]])
    # Off by d rows, and both points share the blame: d / sqrt(2).
    assert distances(points, others, matrix) == pytest.approx(np.array([0, 2, 1]) / np.sqrt(2))


def test_a_rigid_scene_is_more_consistent_than_one_that_melts() -> None:
    rigid = panned(8, 2, 1)
    y, x = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    melting = []
    for t in range(8):
        dx = 4.0 * torch.sin(t + y / 9)
        dy = 4.0 * torch.sin(1.7 * t + x / 11)
        grid = torch.stack([2 * (x + dx) / (WIDTH - 1) - 1, 2 * (y + dy) / (HEIGHT - 1) - 1], -1)
        frame = rigid[:, t][None].float()
        warped = torch.nn.functional.grid_sample(
            frame, grid[None].float(), padding_mode="border", align_corners=True
        )
        melting.append(warped[0].byte())
    calm, melted = sampson_error(rigid), sampson_error(torch.stack(melting, 1))
    assert calm is not None and melted is not None
    assert calm < 0.3 < melted
    assert sampson_error(rigid, first=7) is None  # a single frame
    assert sampson_error(torch.full((3, 6, 64, 64), 90, dtype=torch.uint8)) is None
