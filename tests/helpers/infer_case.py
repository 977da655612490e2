"""A checkpoint that was trained on the tiny DV8x16x16 tokenizer, and inputs that fit it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from cosmos_posttrain import load_tokenizer
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.data.contract import Contract, TokenizerInfo, make_contract
from cosmos_posttrain.geometry import ClipGeometry, LatentShape
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.video import write_mp4

TOKENIZER = "tiny-dv8x16x16"
FRAMES, HEIGHT, WIDTH = 17, 32, 48
LATENT_SHAPE = LatentShape(3, 2, 3)


def moving_bar(num_frames: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """A bright bar that moves over a gradient, (3, T, H, W) uint8."""
    row = torch.linspace(30, 120, width)
    frames = row.expand(3, num_frames, height, width).clone()
    for number in range(num_frames):
        frames[:, number, :, 2 * number % width :][..., :6] = 230
    return frames.to(torch.uint8)


def write_input(path: Path, num_frames: int = 20, fps: float = 12.0) -> Path:
    write_mp4(path, moving_bar(num_frames), fps)
    return path


def contract() -> Contract:
    """What a data set's manifest says."""
    tokenizer = load_tokenizer(TOKENIZER)
    levels = tuple(tokenizer.levels)
    compression = tokenizer.compression
    info = TokenizerInfo(TOKENIZER, tokenizer.sha256, compression, levels, tokenizer.vocab_size)
    return make_contract(info, ClipGeometry(FRAMES, HEIGHT, WIDTH, compression), "uint16")


def write_checkpoint(folder: Path, size: str = "tiny", **changes: Any) -> Path:
    """A checkpoint without weights: enough for everything that comes before they are loaded."""
    (folder / "weights").mkdir(parents=True)
    data = context.TrainingData(dataclasses.replace(contract(), **changes))
    context.write_context(folder, preset(size, 1000, LATENT_SHAPE), data=data)
    return folder


def random_config(input_path: Path, folder: Path, **changes: Any) -> InferConfig:
    """A run with fresh weights."""
    values: dict[str, Any] = {
        "input_image_or_video_path": str(input_path),
        "ar_model_dir": "random:tiny",
        "encoder_path": TOKENIZER,
        "num_context_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "video_save_folder": str(folder),
        "disable_diffusion_decoder": True,
        "disable_guardrail": True,
    }
    return InferConfig(**(values | changes))


def write_jsonl(path: Path, *inputs: str) -> Path:
    path.write_text("".join(json.dumps({"visual_input": name}) + "\n" for name in inputs))
    return path
