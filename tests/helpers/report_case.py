"""Run folders and evaluations for the tests of the report, as the other commands write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_posttrain import files
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.context import SplitInfo, TrainingData
from cosmos_posttrain.config import merge, to_yaml
from cosmos_posttrain.data.contract import TokenizerInfo, make_contract
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.video import write_mp4

NUM_FRAMES, NUM_GIVEN, HEIGHT, WIDTH = 17, 9, 96, 160
OLD = TokenizerInfo("old-tokenizer", "1" * 64, (8, 16, 16), (8, 5, 5, 5), 1000)
NEW = TokenizerInfo("new-tokenizer", "2" * 64, (4, 8, 8), (8, 5, 5, 5), 1000)


def write_run(log_dir: Path, num_steps: int = 200, final_loss: float = 4.0) -> Path:
    """A run folder without weights: curves, config, and the context of its last checkpoint."""
    generator = np.random.default_rng(num_steps)
    rows = []
    for step in range(num_steps):
        loss = final_loss + 3 * np.exp(-5 * step / num_steps) + 0.15 * generator.normal()
        row = {
            "step": step,
            "reduced_train_loss": float(loss),
            "lr": 1e-3 * (1 - step / num_steps),
            "grad_norm": float(1 + generator.exponential()),
            "consumed_samples": 2 * (step + 1),
            "tokens_per_second": float(3000 + 200 * generator.normal()),
            "mfu": None,
        }
        if (step + 1) % max(num_steps // 5, 1) == 0:
            row["val_loss"] = float(loss) + 0.2
        rows.append(row)
    inner = log_dir / "default"
    inner.mkdir(parents=True)
    files.write_json_lines(inner / "metrics.jsonl", rows)
    settings: list[tuple[str, Any]] = [
        ("log_dir", str(log_dir)),
        ("data.path", "prepared"),
        ("model.path", "runs/old"),
        ("max_steps", num_steps),
        ("optimizer.lr", 1e-3),
    ]
    (inner / "config.yaml").write_text(to_yaml(merge(TrainConfig, None, settings)))
    environment = {"command_line": ["train_general.py", "--max_steps", "200"], "num_processes": 2}
    launch = {"started": "2026-01-01T00:00:00+00:00", "environment": environment}
    files.write_json_lines(inner / "launches.jsonl", [launch])
    geometry = ClipGeometry(NUM_FRAMES, HEIGHT, WIDTH, Compression(*NEW.compression))
    data = TrainingData(
        make_contract(NEW, geometry, "uint16"),
        "0" * 64,
        SplitInfo("98,1,1", 1234),
        started_from={"model_path": "runs/old", "checkpoint": "c", "tokenizer": to_plain(OLD)},
    )
    checkpoint = inner / "checkpoints" / context.checkpoint_name(0, num_steps)
    (checkpoint / "weights").mkdir(parents=True)
    context.write_context(checkpoint, preset("tiny"), data)
    return log_dir


def loss_figures(nats: float, seed: int) -> dict[str, Any]:
    """What ``evaluate.py loss`` says of one predictor."""
    generator = np.random.default_rng(seed)
    places = nats + 0.4 * np.sin(np.arange(20) / 5)[None] + 0.1 * generator.normal(size=(12, 20))
    return {
        "nats_per_token": nats,
        "bits_per_token": nats / np.log(2),
        "perplexity": float(np.exp(nats)),
        "top_1": 0.2,
        "top_5": 0.4,
        "ci95": {"nats_per_token": [nats - 0.1, nats + 0.1]},
        "per_latent_frame": [nats + 1.5, *(nats + 0.3 / frame for frame in range(1, 5))],
        "per_position": places.tolist(),
    }


def write_loss(folder: Path, model: Path, nats: float = 4.1) -> Path:
    """An evaluation of the loss, in which ``bigram`` is the best baseline."""
    baselines = {
        name: loss_figures(value, seed) | {"nats_above_model_ci95": [0.1, 2.0]}
        for seed, (name, value) in enumerate(
            {"uniform": 6.908, "unigram": 6.2, "previous_frame": 5.3, "bigram": 5.1}.items()
        )
    }
    return _write(
        folder,
        "loss",
        {"model": str(model.resolve()), "split": "test"},
        loss_figures(nats, 9) | {"num_clips": 3, "baselines": baselines},
        [{"clip": n, "source": f"{n}.mp4", "nats_per_token": 4.0 + 0.1 * n} for n in range(3)],
    )


def write_generation(
    folder: Path, model: Path, names: Sequence[str] = ("calm", "broken", "fast")
) -> Path:
    """Generated clips with their scores; the one called ``broken`` was flagged."""
    rows = []
    for number, name in enumerate(names):
        defects = [{"kind": "solid_color", "frame": 11, "measure": 2.0}]
        defects = defects if name == "broken" else []
        row = {"name": name, "clip": number, "video": f"{name}.mp4", "psnr": 22.0 - number}
        row |= {"defects": defects, "num_failed_samples": len(defects)}
        rows.append(row)
        for film in ("truth", "reconstruction", "generated"):
            frames = moving_square(number, bool(defects) and film == "generated")
            write_mp4(folder / "clips" / name / f"{film}.mp4", frames, 8.0)

    def of(psnr: float) -> dict[str, Any]:
        curve = [26.0] * NUM_GIVEN
        curve += [psnr + 4 - frame for frame in range(NUM_FRAMES - NUM_GIVEN)]
        return {"psnr": psnr, "ssim": psnr / 30, "by_frame": {"psnr": curve}}

    figures = {
        "generated": of(21.0),
        "repeat_last_frame": of(19.0),
        "constant_motion": of(19.5),
        "reconstruction": of(25.0),
        "failure_rate": 1 / 3,
        "failure_rate_interval": [0.06, 0.79],
        "failures_by_kind": {"solid_color": 1},
    }
    settings = {"model": str(model.resolve()), "num_input_frames": NUM_GIVEN}
    return _write(folder, "generate", settings, figures, rows)


def moving_square(number: int, is_broken: bool = False) -> np.ndarray:
    """(3, T, H, W) uint8; a broken one turns grey."""
    frames = np.empty((3, NUM_FRAMES, HEIGHT, WIDTH), np.uint8)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    frames[0], frames[1], frames[2] = rows + 40, columns // 2 + 30 * number, 140 - rows // 2
    for frame in range(NUM_FRAMES):
        left = (8 * frame + 20 * number) % (WIDTH - 24)
        frames[:, frame, 40:64, left : left + 24] = np.array([250, 210, 60])[:, None, None]
        if is_broken and frame >= 11:
            frames[:, frame] = 120
    return frames


def _write(
    folder: Path,
    command: str,
    settings: dict[str, Any],
    figures: dict[str, Any],
    rows: list[dict[str, Any]],
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"command_line": ["evaluate.py", command], "torch": "2.6.0"}
    metrics = {
        "command": command,
        "settings": {"command": command, **settings},
        "figures": figures,
        "rows": rows,
        "failures": [],
        "environment": environment,
        "seconds": 12.5,
    }
    files.write_json(folder / "metrics.json", metrics)
    return folder
