"""The same small videos prepared with two tokenizers, for tests of what lies between them."""

from __future__ import annotations

from pathlib import Path

import torch

from cosmos_posttrain.prepare.prepare import prepare
from helpers.prepared import BlockMean, config, make_videos


class Shuffled(BlockMean):
    """``BlockMean`` with its codes renamed: code c becomes 63 - c."""

    id = "shuffled"
    sha256 = "1" * 64

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return 63 - super().encode(video)


class Coarse(BlockMean):
    """Another vocabulary: 40 codes, of which only the lower ones appear."""

    id = "coarse"
    sha256 = "2" * 64
    levels = (8, 5)
    vocab_size = 40

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        return super().encode(video) // 2


def prepare_pair(
    folder: Path, new: BlockMean, num_videos: int = 5, **changes: object
) -> tuple[Path, Path]:
    """Prepares ``folder/old`` with ``BlockMean`` and ``folder/new`` with another tokenizer."""
    videos = folder / "videos"
    videos.mkdir(parents=True)
    make_videos(videos, num_videos)
    for name, tokenizer in (("old", BlockMean()), ("new", new)):
        prepare(config(videos, folder / name, **changes), tokenizer)
    return folder / "old", folder / "new"
