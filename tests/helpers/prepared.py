"""A small real tokenizer and small data sets for tests of the data room."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from cosmos_posttrain.data.contract import TokenizerInfo, make_contract
from cosmos_posttrain.data.layout import shard_name
from cosmos_posttrain.data.manifest import DocumentRow
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.prepare.folder import OutputFolder, write_shard
from cosmos_posttrain.prepare.prepare import prepare
from helpers.video_files import grey_frames, write_video


class BlockMean:
    """Quantised mean of each 4x8x8 block (the first frame alone), 64 codes; causal like the DV."""

    id = "block-mean"
    sha256 = "0" * 64
    compression = Compression(4, 8, 8)
    levels = (8, 8)
    vocab_size = 64
    dtype = torch.float32
    device = torch.device("cpu")

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        first = video[:, :, :1].expand(-1, -1, 4, -1, -1)
        blocks = torch.cat([first, video[:, :, 1:]], dim=2).mean(dim=1)
        mean = torch.nn.functional.avg_pool3d(blocks[:, None], (4, 8, 8))[:, 0]
        return ((mean + 1) * 31.5).round().to(torch.int32)


def make_videos(folder: Path, num_videos: int = 5, num_frames: int = 20) -> Path:
    """Videos 0.mp4, 1.mp4, ... of different grey levels and lengths."""
    for number in range(num_videos):
        images = [image + 3 * number for image in grey_frames(num_frames + number, 32, 48)]
        write_video(folder / f"{number}.mp4", images)
    return folder


def config(videos: Path, output: Path, **changes: object) -> PrepareConfig:
    """16x24 pixels, 9 frames, 4x8x8: (3, 2, 3) latents, 18 tokens a clip; 2 videos a shard."""
    settings = {
        "input_videos_dir": str(videos),
        "output_prefix": str(output),
        "width": 24,
        "height": 16,
        "num_context_frames": 9,
        "tokenizer_compression_factor": "4,8,8",
        "clips_per_video": "2",
        "videos_per_shard": 2,
        "batch_size": 2,
        **changes,
    }
    return PrepareConfig(**settings)  # type: ignore[arg-type]


def prepare_small(videos: Path, output: Path, **changes: object):
    return prepare(config(videos, output, **changes), BlockMean())


def write_data_set(folder: Path, num_shards: int, num_documents: int = 2) -> Path:
    """A complete folder of random tokens, one document a source, without any video."""
    geometry = ClipGeometry(9, 16, 24, BlockMean.compression)
    info = TokenizerInfo("block-mean", BlockMean.sha256, (4, 8, 8), (8, 8), 64)
    contract = make_contract(info, geometry, "uint16")
    output = OutputFolder(folder, contract, {"num_sources": num_shards * num_documents}, num_shards)
    output.start(overwrite=False)
    generator = np.random.default_rng(0)
    for shard in range(num_shards):
        tokens = generator.integers(0, 64, (num_documents, contract.seq_length))
        rows = [DocumentRow(n, f"{shard}/{n}.mp4") for n in range(num_documents)]
        write_shard(
            folder, shard_name(shard), "uint16", list(zip(rows, tokens, strict=True)), [], []
        )
    output.finish()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
