"""What a run folder tells: curves, settings, data, the start of the run, what it ran on.

Flows in: the ``--log_dir`` of a training. Flows out: a ``ReportedRun``; no weights are read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.context import TrainingData
from cosmos_posttrain.config import to_dict
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.evaluation.report.curves import Curves, read_curves
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.runlog import METRICS_FILE
from cosmos_posttrain.training.config import TrainConfig


@dataclass(frozen=True)
class ReportedRun:
    """One training run.

    Attributes:
        folder: its ``--log_dir``.
        name: the folder's name, with as many parents as it takes to tell the runs apart.
        curves: of ``metrics.jsonl``.
        settings: the resolved config, dotted key -> value; empty where it cannot be read.
        checkpoints: complete ones, oldest first.
        data: what the newest of them records.
        model: the numbers of the model.
        launches: how the run was started, one object a start; empty for runs of older versions.
    """

    folder: Path
    name: str
    curves: Curves
    settings: dict[str, Any]
    checkpoints: list[Path]
    data: TrainingData
    model: ModelConfig
    launches: list[dict[str, Any]]


def open_runs(folders: list[str]) -> list[ReportedRun]:
    """Opens run folders.

    Raises:
        ConfigError: one of them holds no run, or no checkpoint.
        CheckpointError: a checkpoint's record is damaged.
    """
    found = [_log_dir(Path(folder)) for folder in folders]
    names = short_names(found)
    return [_open(folder, name) for folder, name in zip(found, names, strict=True)]


def _log_dir(path: Path) -> Path:
    """LOG_DIR for itself and for LOG_DIR/default."""
    is_inner = path.name == "default" and not (path / "default").is_dir()
    return path.parent if is_inner else path


def short_names(folders: list[Path]) -> list[str]:
    """The folders' names, each with as many parents as it takes to tell them apart."""
    parts = [folder.resolve().parts[1:] or ("/",) for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _open(folder: Path, name: str) -> ReportedRun:
    inner = folder / "default"
    if not (inner / METRICS_FILE).is_file():
        raise ConfigError(
            f"--run {folder} holds no training run (no default/{METRICS_FILE}); name the --log_dir "
            "of one."
        )
    curves = read_curves(inner / METRICS_FILE)
    checkpoints = context.list_checkpoints(folder)
    if not checkpoints or not curves.num_steps:
        what = "no complete checkpoint" if curves.num_steps else "no finished step"
        raise ConfigError(
            f"the run in {folder} has {what} yet; let it go on until it has saved one, then make "
            "the report."
        )
    newest = checkpoints[-1]
    return ReportedRun(
        folder=folder,
        name=name,
        curves=curves,
        settings=_settings(inner / "config.yaml"),
        checkpoints=checkpoints,
        data=context.read_data(newest) or TrainingData(),
        model=context.read_model_config(newest),
        launches=_objects(inner / context.LAUNCHES_FILE),
    )


def flattened(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects as dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def default_settings() -> dict[str, Any]:
    """What a run's settings are where nothing is asked for."""
    return flattened(to_dict(TrainConfig()))


def _settings(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return flattened(tree) if isinstance(tree, dict) else {}


def _objects(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; what is none, a half-written line say, is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found
