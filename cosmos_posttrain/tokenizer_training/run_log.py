"""What a tokenizer training says: the run log, pictures of reconstructions and a progress line.

Flows in: one row of numbers per step and the reconstructions of each validation, on rank 0. Flows
out, in the run's folder: what ``runlog.RunLog`` writes, and ``reconstructions/step=N.png``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_posttrain import files
from cosmos_posttrain.runlog import ProgressDisplay, RunLog
from cosmos_posttrain.tokenizer_training.config import TokenizerTrainConfig

_PICTURE_FRAMES = 8


class TokenizerRunLog:
    """The run log, with pictures.

    Args:
        config: of the run.
        output: its folder.
        completed_steps: steps that the run had when it was started or resumed.
    """

    def __init__(self, config: TokenizerTrainConfig, output: Path, completed_steps: int) -> None:
        self._output, self._log_every = output, config.log_every
        self._log = RunLog(output, config, completed_steps)
        self._progress = ProgressDisplay(config.max_steps, "steps", done=completed_steps)
        self.close = self._log.close

    def write(self, row: dict[str, Any]) -> None:
        """Records one step; ``row["step"]`` counts from 0."""
        self._log.write(row)
        done = row["step"] + 1
        parts = [
            f"loss {row['loss']:.4f}",
            f"psnr {row['psnr']:.2f} dB",
            f"codes {row['codes_used']}",
            f"lr {row['lr']:.2e}",
        ]
        is_validated = "validation_psnr" in row
        if is_validated:
            parts.append(
                f"validation psnr {row['validation_psnr']:.2f} dB, "
                f"ssim {row['validation_ssim']:.4f}, codes {row['validation_codes_used']}, "
                f"{row['validation_entropy_bits']:.2f} bits"
            )
        is_due = self._log_every is not None and done % self._log_every == 0
        self._progress.show(done, ", ".join(parts), force=is_due or is_validated)

    def write_picture(self, video: Tensor, reconstruction: Tensor, done: int) -> None:
        """Records a picture of one clip.

        Args:
            video: (3, T, H, W) in [-1, 1].
            reconstruction: the same, need not be clamped.
            done: completed steps.
        """
        from PIL import Image

        pixels = reconstruction_picture(video, reconstruction)
        folder = self._output / "reconstructions"
        folder.mkdir(exist_ok=True)
        with files.replacing(folder / f"step={done}.png") as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
        self._log.write_picture("reconstructions", pixels, done - 1)


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
