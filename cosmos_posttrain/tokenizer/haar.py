"""The 3D Haar wavelet patcher and its inverse.

Flows in: a clip in pixels. Flows out: the same information at ``1 / patch_size`` of its length,
height and width with ``patch_size ** 3`` times the channels (Cosmos World Foundation Model
Platform, section 4.1: "a 2-level Haar wavelet transform").

Every level is applied to all channels, so ``log2(patch_size)`` levels are one orthogonal (up to
scale) linear map of each ``patch_size ** 3`` block of pixels: one matrix product here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def haar_matrix(patch_size: int) -> Tensor:
    """The wavelet transform of one block as a matrix.

    Row ``sub`` reads, from the highest bit down, (t, h, w) of the last level, then of the level
    before; a bit is 0 for the low and 1 for the high band. Column ``pos`` is a pixel's
    (t, h, w) in the block. Level ``l`` pairs pixels that differ in bit ``l`` of a coordinate.

    Args:
        patch_size: a power of two.

    Returns:
        (patch_size ** 3, patch_size ** 3) float32 of entries +-1; times its transpose it is
        ``patch_size ** 3`` times the identity.
    """
    num_levels = patch_size.bit_length() - 1
    index = torch.arange(patch_size**3)
    position = (
        index // patch_size**2,
        index // patch_size % patch_size,
        index % patch_size,
    )
    parity = torch.zeros(patch_size**3, patch_size**3, dtype=torch.int64)
    for level in range(num_levels):
        for axis in range(3):
            band = index >> (3 * level + 2 - axis) & 1
            pixel = position[axis] >> level & 1
            parity += band[:, None] * pixel[None, :]
    return (1 - 2 * (parity % 2)).float()


def to_blocks(video: Tensor, patch_size: int, is_first: bool) -> Tensor:
    """Cuts a clip into blocks of ``patch_size ** 3`` pixels.

    Args:
        video: (B, C, T, H, W); T is ``1 + k * patch_size`` when ``is_first`` (the first frame is
            then repeated to fill a block by itself), else ``k * patch_size``.
        patch_size: frames, rows and columns of a block.
        is_first: whether the clip's own first frame is the first frame here.

    Returns:
        (B, T', H', W', C, patch_size ** 3), pixels of a block ordered (t, h, w).
    """
    p = patch_size
    if is_first:
        first = video[:, :, :1].expand(-1, -1, p - 1, -1, -1)
        video = torch.cat([first, video], dim=2)
    b, c, t, h, w = video.shape
    blocks = video.reshape(b, c, t // p, p, h // p, p, w // p, p)
    return blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, t // p, h // p, w // p, c, p * p * p)


def from_blocks(blocks: Tensor, patch_size: int, is_first: bool) -> Tensor:
    """(B, T', H', W', C, patch_size ** 3) -> (B, C, T, H, W); drops the repeated frames."""
    p = patch_size
    b, t, h, w, c, _ = blocks.shape
    video = blocks.reshape(b, t, h, w, c, p, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    video = video.reshape(b, c, t * p, h * p, w * p)
    return video[:, :, p - 1 :] if is_first else video


class HaarPatcher(nn.Module):
    """Pixels -> wavelet coefficients, causal in time."""

    matrix: Tensor

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("matrix", haar_matrix(patch_size) / patch_size**3, persistent=False)

    def forward(self, video: Tensor, is_first: bool = True) -> Tensor:
        """(B, C, T, H, W) -> (B, T', H', W', patch_size ** 3 * C), channels (band, colour).

        ``is_first`` and T are those of :func:`to_blocks`.
        """
        blocks = to_blocks(video, self.patch_size, is_first)
        return torch.matmul(blocks, self.matrix.T).transpose(4, 5).flatten(4)


class HaarUnpatcher(nn.Module):
    """Wavelet coefficients -> pixels; the exact inverse of :class:`HaarPatcher`."""

    matrix: Tensor

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("matrix", haar_matrix(patch_size).T.contiguous(), persistent=False)

    def forward(self, bands: Tensor, is_first: bool = True) -> Tensor:
        """(B, T', H', W', patch_size ** 3 * C) -> (B, C, T, H, W)."""
        # Contiguous, so that it is one large product and not one small one for each block.
        blocks = bands.unflatten(4, (self.patch_size**3, -1)).transpose(4, 5).contiguous()
        return from_blocks(torch.matmul(blocks, self.matrix.T), self.patch_size, is_first)
