"""What a run says about itself: a progress line, metrics.jsonl, TensorBoard and W&B.

Flows in: one dict of numbers per step, on rank 0. Flows out: the same numbers everywhere. W&B is
used when ``WANDB_API_KEY`` or ``WANDB_MODE`` is set.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cosmos_posttrain.config import to_dict
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.config import ModelConfig
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
    return tokens_per_second * flops_per_token(model) / (peak * groups.world_size())


class MetricsLog:
    """Writes each step's numbers to every place; only rank 0 does anything.

    Args:
        config: the run's config.
        run: ``LOG_DIR/default``.
        completed_steps: steps that the run had when it was started or resumed.
    """

    def __init__(self, config: TrainConfig, run: Path, completed_steps: int) -> None:
        self.max_steps = config.max_steps
        self.active = groups.rank() == 0
        self.started, self.first = time.monotonic(), completed_steps
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.file = (run / "metrics.jsonl").open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(str(run / "tb_logs"), purge_step=completed_steps)
        self.wandb = start_wandb(config, run)

    def say(self, text: str) -> None:
        """Prints a line, once."""
        if self.active:
            print(text, flush=True)

    def write(self, values: dict[str, Any]) -> None:
        """Records one step."""
        if not self.active:
            return
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        numbers = {k: v for k, v in values.items() if k != "step" and v is not None}
        for key, value in numbers.items():
            self.tensorboard.add_scalar(key, value, values["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=values["step"])
        self._print_progress(values)

    def _print_progress(self, values: dict[str, Any]) -> None:
        done = values["step"] + 1
        rate = (time.monotonic() - self.started) / max(done - self.first, 1)
        minutes, seconds = divmod(round(rate * (self.max_steps - done)), 60)
        parts = [
            f"step {done}/{self.max_steps}",
            f"loss {values['reduced_train_loss']:.4f}",
            f"lr {values['lr']:.2e}",
            f"grad norm {values['grad_norm']:.3f}",
            f"{values['tokens_per_second']:,.0f} tokens/s",
        ]
        if values.get("mfu") is not None:
            parts.append(f"MFU {values['mfu']:.1%}")
        if values.get("val_loss") is not None:
            parts.append(f"val loss {values['val_loss']:.4f}")
        self.say(" | ".join([*parts, f"ETA {minutes // 60}:{minutes % 60:02d}:{seconds:02d}"]))

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.active:
            self.file.close()
            self.tensorboard.close()
            if self.wandb is not None:
                self.wandb.finish()


def wants_wandb() -> bool:
    """True where the environment asks for W&B.

    Raises:
        ConfigError: it asks, but wandb is not installed.
    """
    if not (os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")):
        return False
    if find_spec("wandb") is None:
        raise ConfigError(
            "WANDB_API_KEY or WANDB_MODE is set, but wandb is not installed; pip install wandb, or "
            "unset the variable."
        )
    return True


def start_wandb(config: object, run: Path) -> Any:
    """The W&B run of a run folder, a new one or the one that it had before.

    Args:
        config: a structured config, recorded with the run.
        run: the folder that keeps the run's id; its parent's name is the run's.

    Returns:
        A ``wandb`` run, or None where the environment asks for none.

    Raises:
        ConfigError: it asks, but wandb is not installed.
    """
    if not wants_wandb():
        return None
    import wandb

    # One W&B run per run folder, so that a resumed run goes on in the same curves.
    id_file = run / "wandb_id.txt"
    if not id_file.is_file():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    return wandb.init(
        project=os.environ.get("WANDB_PROJECT", "cosmos_posttrain"),
        name=os.environ.get("WANDB_NAME", run.parent.name),
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run),
        config=to_dict(config),
    )
