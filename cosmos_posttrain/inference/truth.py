"""What a generated clip is compared with: the source video's frames, or the truth's tokens decoded.

Flows in: an item, and the size of its clip. Flows out: frames (3, T, H, W) uint8, black where there
is no truth any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from cosmos_posttrain.inference.outputs import Item
from cosmos_posttrain.video import read_clips


def true_frames(
    item: Item, num_frames: int, height: int, width: int, decode: Callable[[Tensor], Tensor]
) -> Tensor:
    """The truth of an item's clip.

    Args:
        item: of a video or of tokens.
        num_frames: of the clip, all chunks together.
        height: pixels.
        width: pixels.
        decode: makes frames of tokens.

    Returns:
        (3, num_frames, height, width) uint8.

    Raises:
        VideoError: the video cannot be decoded.
        DatasetError: the tokens are damaged.
    """
    if item.true_tokens is not None:
        found = decode(item.true_tokens())[:, :num_frames]
    else:
        assert item.path is not None
        clip = read_clips(item.path, [0], num_frames, height, width)[0]
        found = clip.frames[:, : num_frames - clip.num_repeated]
    missing = found.new_zeros(3, num_frames - found.shape[1], height, width)
    return torch.cat([found, missing], dim=1)


def beside(parts: Iterable[Tensor], truth: Tensor) -> Iterator[Tensor]:
    """Parts of a clip, (3, n, H, W) each, with the truth at their right: (3, n, H, 2 W)."""
    done = 0
    for part in parts:
        count = part.shape[1]
        yield torch.cat([part, truth[:, done : done + count]], dim=3)
        done += count
