"""Small runs for the training tests: a grid of 3x2x3 tokens, 64 codes, a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cosmos_posttrain.training.config import TrainConfig


def make_config(tokens: Path, log_dir: Path, **changes: Any) -> TrainConfig:
    """A run of a few seconds; ``changes`` are dotted keys with double underscores for dots."""
    from cosmos_posttrain.config import merge

    settings = {
        "data.path": str(tokens),
        "data.split_string": "3,1,1",
        "model.path": "random:tiny",
        "parallel.tensor_model_parallel_size": 1,
        "log_dir": str(log_dir),
        "optimizer.lr": 1e-3,
        "max_steps": 20,
        "save_every_n_steps": 10,
        "global_batch_size": 4,
        "num_threads": 1,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return merge(TrainConfig, None, list(settings.items()))


def losses(log_dir: Path) -> list[float]:
    """Training losses by step; fails unless each step stands there exactly once, in order."""
    lines = (log_dir / "default" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["reduced_train_loss"] for row in rows]


def run(config: TrainConfig) -> str:
    """Trains; returns the last checkpoint's name. At the top level for ``run_distributed``."""
    from cosmos_posttrain.training.trainer import train

    return train(config).name
