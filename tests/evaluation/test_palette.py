"""The trivial coder: mean colours of blocks, painted from a palette."""

from __future__ import annotations

import pytest
import torch

from cosmos_posttrain.errors import GeometryError
from cosmos_posttrain.evaluation.palette import PaletteCoder, block_means, fit_palette
from cosmos_posttrain.geometry import Compression

COMPRESSION = Compression(4, 8, 16)


def random_clips(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 9, 16, 32, generator=generator) * 2 - 1


def test_a_block_is_the_mean_of_its_pixels_and_the_first_frame_stands_alone() -> None:
    clip = random_clips(1)
    means = block_means(clip, COMPRESSION)
    assert means.shape == (1, 3, 3, 2, 2)
    assert torch.allclose(means[0, :, 0, 1, 0], clip[0, :, 0, 8:, :16].mean((1, 2)))
    assert torch.allclose(means[0, :, 2, 0, 1], clip[0, :, 5:9, :8, 16:].mean((1, 2, 3)))
    assert torch.equal(block_means(clip[:, :, :1], COMPRESSION), means[:, :, :1])


def test_a_clip_painted_in_palette_colours_comes_back_exactly() -> None:
    palette = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    coder = PaletteCoder(palette, COMPRESSION)
    indices = torch.arange(36).view(3, 3, 2, 2).int()
    video = coder.decode(indices)
    assert video.shape == (3, 3, 9, 16, 32)
    assert torch.equal(coder.encode(video), indices)
    assert coder.encode(video).dtype == torch.int32


def test_encoding_takes_the_nearest_colour() -> None:
    clips = random_clips(4)
    coder = fit_palette(clips, COMPRESSION, num_colors=20)
    means = block_means(clips, COMPRESSION).movedim(1, -1).reshape(-1, 3)
    nearest = torch.cdist(means, coder.palette).argmin(1)
    assert torch.equal(coder.encode(clips).flatten().long(), nearest)


@pytest.mark.parametrize("seed", range(3))
def test_k_means_finds_separate_colours_and_leaves_no_better_centre(seed: int) -> None:
    colors = torch.cartesian_prod(*[torch.tensor([-0.9, 0.9])] * 3)
    generator = torch.Generator().manual_seed(2)
    # Uneven shares: random starts would put several centres into the first colour.
    shares = torch.tensor([0.93] + [0.01] * 7)
    picks = torch.multinomial(shares, 4800, replacement=True, generator=generator)
    painted = PaletteCoder(colors, COMPRESSION).decode(picks.view(400, 3, 2, 2))
    clips = (painted + 0.02 * torch.randn(painted.shape, generator=generator)).clamp(-1, 1)
    coder = fit_palette(clips, COMPRESSION, num_colors=8, seed=seed)
    found = coder.palette[torch.cdist(colors, coder.palette).argmin(1)]
    assert torch.allclose(found, colors, atol=0.01)
    means = block_means(clips, COMPRESSION).movedim(1, -1).reshape(-1, 3)
    members = coder.encode(clips).flatten()
    for index in range(8):
        assert torch.allclose(coder.palette[index], means[members == index].mean(0), atol=1e-5)


def test_the_same_seed_gives_the_same_palette() -> None:
    clips = random_clips(4)
    first, again, other = (
        fit_palette(clips, COMPRESSION, 10, max_samples=30, seed=seed).palette for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_clip_that_does_not_divide_into_blocks_is_refused() -> None:
    with pytest.raises(GeometryError, match="height 15"):
        block_means(torch.zeros(1, 3, 9, 15, 32), COMPRESSION)
