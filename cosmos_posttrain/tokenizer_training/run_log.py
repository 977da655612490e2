"""What a tokenizer training says: metrics.jsonl, TensorBoard, W&B, pictures and a progress line.

Flows in: one row of numbers per step and the reconstructions of each validation, on rank 0. Flows
out, in the run's folder: ``metrics.jsonl``, ``tb_logs/`` and ``reconstructions/step=N.png``. W&B is
used when ``WANDB_API_KEY`` or ``WANDB_MODE`` is set.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_posttrain.tokenizer_training.config import TokenizerTrainConfig

METRICS = "metrics.jsonl"
_PICTURE_FRAMES = 8


def check_wandb() -> None:
    """Refuses early where the environment asks for W&B and it is not installed.

    Raises:
        ConfigError: says what to install.
    """
    if _asks_for_wandb():
        from cosmos_posttrain.training.metrics import wants_wandb

        wants_wandb()


def _asks_for_wandb() -> bool:
    """Keeps the import of the world model's metrics, and so Megatron, out of other runs."""
    return "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ


class RunLog:
    """Writes each step's numbers to every place.

    Args:
        config: of the run.
        output: its folder.
        completed_steps: steps that the run had when it was started or resumed.
    """

    def __init__(self, config: TokenizerTrainConfig, output: Path, completed_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.config, self.output = config, output
        self.started, self.first = time.monotonic(), completed_steps
        _keep_lines_before(output / METRICS, completed_steps)
        self.file = (output / METRICS).open("a", encoding="utf-8")
        logs = output / "tb_logs"
        self.tensorboard = SummaryWriter(str(logs), purge_step=completed_steps)
        self.wandb: Any = None
        if _asks_for_wandb():
            from cosmos_posttrain.training.metrics import start_wandb

            self.wandb = start_wandb(config, logs)

    def write(self, row: dict[str, Any]) -> None:
        """Records one step; ``row["step"]`` counts from 0."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        numbers = {key: value for key, value in row.items() if key != "step"}
        for key, value in numbers.items():
            self.tensorboard.add_scalar(key, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])
        done = row["step"] + 1
        if done % self.config.log_every == 0 or done == self.config.max_steps:
            self._print_progress(row)

    def write_picture(self, video: Tensor, reconstruction: Tensor, done: int) -> None:
        """Records a picture of one clip.

        Args:
            video: (3, T, H, W) in [-1, 1].
            reconstruction: the same, need not be clamped.
            done: completed steps.
        """
        from PIL import Image

        pixels = reconstruction_picture(video, reconstruction)
        folder = self.output / "reconstructions"
        folder.mkdir(exist_ok=True)
        temporary = folder / f".step={done}.tmp"
        Image.fromarray(pixels).save(temporary, format="PNG")
        temporary.replace(folder / f"step={done}.png")
        self.tensorboard.add_image("reconstructions", pixels, done - 1, dataformats="HWC")
        if self.wandb is not None:
            import wandb

            self.wandb.log({"reconstructions": wandb.Image(pixels)}, step=done - 1)

    def _print_progress(self, row: dict[str, Any]) -> None:
        done = row["step"] + 1
        steps_per_second = (done - self.first) / (time.monotonic() - self.started)
        eta = (self.config.max_steps - done) / steps_per_second
        print(
            f"step {done}/{self.config.max_steps}  loss {row['loss']:.4f}  "
            f"psnr {row['psnr']:.2f} dB  codes {row['codes_used']}  lr {row['lr']:.2e}  "
            f"{steps_per_second:.2f} steps/s  eta {eta / 60:.1f} min",
            flush=True,
        )

    def close(self) -> None:
        """Flushes and closes everything."""
        self.file.close()
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def reconstruction_picture(video: Tensor, reconstruction: Tensor) -> np.ndarray:
    """Up to eight frames side by side, the input above the reconstruction.

    Args:
        video: (3, T, H, W) in [-1, 1].
        reconstruction: the same.

    Returns:
        (2 * H, n * W, 3) uint8.
    """
    num_frames = video.shape[1]
    count = min(num_frames, _PICTURE_FRAMES)
    picked = torch.linspace(0, num_frames - 1, count).round().long()
    rows = [clip.detach().cpu()[:, picked] for clip in (video, reconstruction)]
    # (2, 3, n, H, W) -> (2, H, n, W, 3)
    both = ((torch.stack(rows).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: np.ndarray = both.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1).numpy()
    return pixels


def _keep_lines_before(path: Path, step: int) -> None:
    """Drops the lines of steps that will be run again, so that each step appears once."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
