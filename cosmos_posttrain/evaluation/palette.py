"""The trivial coder that a learned tokenizer has to beat: each block in its mean colour.

Flows in: clips (B, 3, T, H, W) in [-1, 1]. Flows out: indices (B, t, h, w) into a palette of
colours found by k-means, and clips painted with them. Rate and vocabulary are those of the
tokenizer that it is compared with: one index stands for ``compression.time`` x ``height`` x
``width`` pixels, and for the first frame alone in the first latent frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_posttrain.geometry import ClipGeometry, Compression

_LLOYD_STEPS = 20


def block_means(video: Tensor, compression: Compression) -> Tensor:
    """Mean colour of each block: (B, 3, T, H, W) -> (B, 3, t, h, w).

    Raises:
        GeometryError: if the clip does not divide into blocks.
    """
    ClipGeometry(video.shape[2], video.shape[3], video.shape[4], compression)
    time, height, width = compression
    first = F.avg_pool3d(video[:, :, :1], (1, height, width))
    if video.shape[2] == 1:
        return first
    return torch.cat([first, F.avg_pool3d(video[:, :, 1:], (time, height, width))], dim=2)


class PaletteCoder:
    """Paints each block in the palette's colour nearest to its mean.

    Args:
        palette: (vocab_size, 3) float32 colours in [-1, 1].
        compression: frames, rows and columns of a block.
    """

    def __init__(self, palette: Tensor, compression: Compression) -> None:
        self.palette = palette
        self.compression = compression
        self.vocab_size = len(palette)

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> (B, t, h, w) int32."""
        means = block_means(video, self.compression).movedim(1, -1)
        return _nearest(means.flatten(0, 3), self.palette).view(means.shape[:4]).int()

    def decode(self, indices: Tensor) -> Tensor:
        """(B, t, h, w) integers below vocab_size -> (B, 3, T, H, W) in [-1, 1]."""
        colors = self.palette[indices.long()].movedim(-1, 1)
        time, height, width = self.compression
        colors = colors.repeat_interleave(height, -2).repeat_interleave(width, -1)
        rest = colors[:, :, 1:].repeat_interleave(time, 2)
        return torch.cat([colors[:, :, :1], rest], dim=2)


def fit_palette(
    clips: Tensor,
    compression: Compression,
    num_colors: int,
    max_samples: int = 20_000,
    seed: int = 0,
) -> PaletteCoder:
    """Finds the palette by k-means on the block means of clips.

    k-means++ (Arthur and Vassilvitskii 2007), then 20 steps of Lloyd's algorithm.

    Args:
        clips: (B, 3, T, H, W) in [-1, 1] with at least ``num_colors`` blocks.
        compression: frames, rows and columns of a block.
        num_colors: size of the vocabulary.
        max_samples: blocks that k-means sees, drawn at random.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = block_means(clips, compression).movedim(1, -1).flatten(0, 3)
    samples = samples[torch.randperm(len(samples), generator=generator)[:max_samples]]
    assert len(samples) >= num_colors, "fewer blocks than colours"
    palette = _spread_start(samples, num_colors, generator)
    for _ in range(_LLOYD_STEPS):
        nearest = _nearest(samples, palette)
        sizes = torch.bincount(nearest, minlength=num_colors)[:, None]
        sums = torch.zeros_like(palette).index_add_(0, nearest, samples)
        palette = torch.where(sizes > 0, sums / sizes.clamp_min(1), palette)
    return PaletteCoder(palette, compression)


def _nearest(colors: Tensor, palette: Tensor) -> Tensor:
    """(N, 3) -> (N,) int64; the colour's own square, equal for all of the palette, is left out."""
    return torch.addmm(palette.square().sum(1), colors, palette.T, alpha=-2).argmin(1)


def _spread_start(samples: Tensor, num_colors: int, generator: torch.Generator) -> Tensor:
    """k-means++: each colour is drawn with a chance of its squared distance to those before."""
    chosen = [samples[0]]
    distances = (samples - chosen[0]).square().sum(1)
    for _ in range(num_colors - 1):
        # The small number keeps draws possible when every sample is chosen already.
        pick = int(torch.multinomial(distances + 1e-12, 1, generator=generator))
        chosen.append(samples[pick])
        distances = torch.minimum(distances, (samples - samples[pick]).square().sum(1))
    return torch.stack(chosen)
