"""The ``context`` folder of a checkpoint, and the run folder's layout. JSON only; no torch.

``context/model.json`` holds the model's numbers, ``context/data.json`` the contract of the data set
that it was trained on and which split, ``context/state.json`` how far training went, and
``context/config.yaml`` the run's resolved config. Checkpoints lie in
``LOG_DIR/default/checkpoints/epoch=E-step=S``, S being completed steps - 1.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cosmos_posttrain import files
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig

_NAME = re.compile(r"epoch=(\d+)-step=(\d+)")


def checkpoint_name(epoch: int, completed_steps: int) -> str:
    """The folder name after ``completed_steps`` optimizer steps."""
    return f"epoch={epoch}-step={completed_steps - 1}"


def completed_steps(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint folder's name stands for; 0 for any other name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[2]) + 1 if match else 0


def is_checkpoint(folder: Path) -> bool:
    """True for a folder that this package wrote (complete, since it is renamed last)."""
    return (folder / "context" / "model.json").is_file() and (folder / "weights").is_dir()


def list_checkpoints(log_dir: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    folder = log_dir / "default" / "checkpoints"
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if completed_steps(path) and is_checkpoint(path)]
    return sorted(found, key=completed_steps)


def find_checkpoint(path: Path) -> Path | None:
    """Resolves a checkpoint, a path that differs only in its epoch, or a run (its newest)."""
    if is_checkpoint(path):
        return path
    if completed_steps(path) and path.parent.is_dir():
        for sibling in path.parent.iterdir():
            if completed_steps(sibling) == completed_steps(path) and is_checkpoint(sibling):
                return sibling
    for log_dir in (path, path.parent, path.parent.parent):
        # LOG_DIR, LOG_DIR/default and LOG_DIR/default/checkpoints all mean the run.
        inside = (path == log_dir) or path in (
            log_dir / "default",
            log_dir / "default" / "checkpoints",
        )
        if inside and (checkpoints := list_checkpoints(log_dir)):
            return checkpoints[-1]
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return files.read_json(path, CheckpointError, "restore the checkpoint")


def write_context(
    checkpoint: Path,
    model: ModelConfig,
    data: dict[str, Any] | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint's ``context`` folder."""
    folder = checkpoint / "context"
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "model.json", model.to_json())
    if data is not None:
        files.write_json(folder / "data.json", data)
    if state is not None:
        files.write_json(folder / "state.json", state)


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model's numbers of one of our checkpoints."""
    return ModelConfig.from_json(read_json(checkpoint / "context" / "model.json"))


def read_data(checkpoint: Path) -> dict[str, Any] | None:
    """What data the checkpoint was trained on; None where it was never trained here."""
    path = checkpoint / "context" / "data.json"
    return read_json(path) if path.is_file() else None
