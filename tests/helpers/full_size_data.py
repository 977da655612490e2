"""A few clips of the published models' grid and vocabulary: 5 x 40 x 64 tokens, 64,000 codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cosmos_posttrain.data.contract import TokenizerInfo, make_contract
from cosmos_posttrain.data.layout import shard_name
from cosmos_posttrain.data.manifest import DocumentRow
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.prepare.folder import OutputFolder, write_shard
from helpers.prompts import write_prompt_data

GRID, LEVELS, NUM_CODES = (5, 40, 64), (8, 8, 8, 5, 5, 5), 64000


def random_tokens(num_clips: int) -> np.ndarray:
    """(num_clips, 12800) of all codes."""
    return np.random.default_rng(0).integers(0, NUM_CODES, (num_clips, 12800), dtype=np.int64)


def write_full_size_clips(folder: Path, num_clips: int = 10) -> Path:
    """A complete base data set, one video a clip."""
    geometry = ClipGeometry(17, 320, 512, Compression(4, 8, 8))
    info = TokenizerInfo("given", "0" * 64, (4, 8, 8), LEVELS, NUM_CODES)
    output = OutputFolder(
        folder, make_contract(info, geometry, "uint16"), {"num_sources": num_clips}, 1
    )
    output.start(overwrite=False)
    rows = [DocumentRow(number, f"{number}.mp4") for number in range(num_clips)]
    clips = list(zip(rows, random_tokens(num_clips), strict=True))
    write_shard(folder, shard_name(0), "uint16", clips, [], [])
    output.finish()
    return folder


def write_full_size_prompts(folder: Path, num_clips: int = 10) -> Path:
    """The same with prompts of T5-11B's size."""
    tokens = torch.from_numpy(random_tokens(num_clips)).int()
    return write_prompt_data(folder, tokens, GRID, torch.zeros(num_clips, 512, 1024), LEVELS)
