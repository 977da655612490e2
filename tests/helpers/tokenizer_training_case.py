"""A tokenizer training that takes a second: two synthetic videos and a network of few channels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cosmos_posttrain.tokenizer_training.config import TokenizerDataConfig, TokenizerTrainConfig
from cosmos_posttrain.video import write_mp4


def write_videos(folder: Path, num_frames: int = 24) -> Path:
    """Two synthetic videos of 40x56 pixels: smooth coloured patterns that move."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(56.0), indexing="ij")
    for number in range(2):
        frames = []
        for time in range(num_frames):
            waves = [
                torch.sin((x * (number + 1) + shift * y) / 9 + time / 5 + shift)
                for shift in range(3)
            ]
            frames.append((torch.stack(waves) + 1) * 127.5)
        write_mp4(folder / f"{number}.mp4", torch.stack(frames, dim=1).to(torch.uint8), fps=10)
    return folder


def small_config(videos: Path, output: Path, **changes: Any) -> TokenizerTrainConfig:
    """A 4x8x8 network of 200 codes, six steps, every third batch of images."""
    values: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": 6,
        "batch_size": 2,
        "image_batch_size": 3,
        "image_every": 3,
        "recenter_steps": 4,
        "num_threads": 1,
        "save_every": 3,
        "validate_every": 3,
        "num_validation_clips": 1,
        "device": "cpu",
        "dtype": "float32",
        "network": {
            "channels": 4,
            "channels_mult": [1, 2],
            "num_res_blocks": 1,
            "attn_resolutions": [],
            "patch_size": 4,
            "z_channels": 4,
            "spatial_compression": 8,
            "temporal_compression": 4,
            "embedding_dim": 3,
            "levels": [8, 5, 5],
        },
        "data": TokenizerDataConfig(
            videos=str(videos),
            photographs=False,
            heights=[32, 40],
            num_frames=5,
            crop_sizes=[[32, 32], [32, 48]],
            max_stride=2,
            validation_fraction=0.25,
        ),
    }
    return TokenizerTrainConfig(**values | changes)


def read_rows(folder: Path) -> list[dict[str, float]]:
    """The run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
