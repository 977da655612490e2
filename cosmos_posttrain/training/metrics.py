"""What a training run says about itself, beside what ``runlog`` does with any numbers.

Flows in: one dict of numbers per step. Flows out: the run log, a progress line, and the share of
the GPUs' peak that went into the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cosmos_posttrain import launch
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.runlog import ProgressDisplay, RunLog
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.flops import PEAK_FLOPS, flops_per_token


def model_flops_utilization(tokens_per_second: float, model: ModelConfig) -> float | None:
    """Share of the GPUs' peak that went into model FLOPs; None where the peak is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    if peak is None:
        return None
    return tokens_per_second * flops_per_token(model) / (peak * launch.world_size())


class MetricsLog:
    """Writes each step's numbers to every place; only rank 0 does anything.

    Args:
        config: the run's config.
        run: ``LOG_DIR/default``.
        completed_steps: steps that the run had when it was started or resumed.
    """

    def __init__(self, config: TrainConfig, run: Path, completed_steps: int) -> None:
        self._log = RunLog(run, config, completed_steps)
        self._progress = ProgressDisplay(config.max_steps, "steps", done=completed_steps)
        self.close = self._log.close

    def write(self, values: dict[str, Any]) -> None:
        """Records one step."""
        self._log.write(values)
        parts = [
            f"loss {values['reduced_train_loss']:.4f}",
            f"lr {values['lr']:.2e}",
            f"grad norm {values['grad_norm']:.3f}",
            f"{values['tokens_per_second']:,.0f} tokens/s",
        ]
        if values.get("mfu") is not None:
            parts.append(f"MFU {values['mfu']:.1%}")
        validated = values.get("val_loss") is not None
        if validated:
            parts.append(f"val loss {values['val_loss']:.4f}")
        self._progress.show(values["step"] + 1, ", ".join(parts), force=validated)
