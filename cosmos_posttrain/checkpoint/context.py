"""The ``context`` folder of a checkpoint, and the run folder's layout. JSON only; no torch.

``context/model.json`` holds the model's numbers, ``context/data.json`` what it was trained on
(``TrainingData``), ``context/state.json`` how far training went, and ``context/config.yaml`` the
run's resolved config. Checkpoints lie in
``LOG_DIR/default/checkpoints/epoch=E-step=S``, S being completed steps - 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain import files
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.serial import from_plain, to_plain
from cosmos_posttrain.errors import CheckpointError, DatasetError, UnreadableCheckpointError
from cosmos_posttrain.models.config import ModelConfig

# In LOG_DIR/default: how the run was started, each time.
LAUNCHES_FILE = "launches.jsonl"

# NeMo's mark beside a folder of a checkpoint.
_UNFINISHED = "-unfinished"

_NAME = re.compile(r"epoch=(\d+)-step=(\d+)")


@dataclass(frozen=True)
class SplitInfo:
    """Which clips of a data set were trained on, as the run's settings give them."""

    split_string: str
    seed: int


@dataclass(frozen=True)
class SamplingInfo:
    """How a run draws from its data, where that is not every clip once in each epoch.

    Attributes:
        datasets: fingerprint of each data set, in order.
        weights: share of each; None takes all clips alike.
        clips_per_video_per_epoch: largest number of each video's clips in an epoch; None means all.
    """

    datasets: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    clips_per_video_per_epoch: int | None = None


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on; goes from checkpoint to checkpoint.

    Attributes:
        contract: of the data; None for data without a manifest.
        dataset: fingerprint of the data set.
        split: which of its clips.
        sampling: of which data sets, and how they are drawn; None for every clip of one, or of
            several without shares, once in each epoch.
        embedding_transfer: how the rows of its tokens began (``transfer/``); None where they were
            kept or drawn with the rest of the model.
        started_from: the model that the run began with: its path, the tokenizer that it knew, and
            what was said of the rows of its tokens.
    """

    contract: Contract | None = None
    dataset: str | None = None
    split: SplitInfo | None = None
    sampling: SamplingInfo | None = None
    embedding_transfer: dict[str, Any] | None = None
    started_from: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``context/data.json``; what is not known is left out."""
        plain = {key: value for key, value in to_plain(self).items() if value is not None}
        return {"contract": None, **plain}

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> TrainingData:
        """Reads what ``to_json`` wrote.

        Args:
            values: the file's object.
            where: the file, for messages.

        Raises:
            CheckpointError: a value is missing, of another kind, or contradicts another.
        """
        try:
            data = from_plain(cls, values, where)
        except DatasetError as error:
            raise CheckpointError(f"{str(error).rstrip('.')}; restore the checkpoint.") from error
        problem = None if data.contract is None else data.contract.problem()
        if problem is not None:
            raise CheckpointError(
                f"the contract in {where} is damaged or foreign: {problem}; restore the checkpoint."
            )
        return data


def checkpoint_name(epoch: int, completed_steps: int) -> str:
    """The folder name after ``completed_steps`` optimizer steps."""
    return f"epoch={epoch}-step={completed_steps - 1}"


def completed_steps(checkpoint: Path) -> int:
    """Optimizer steps that a checkpoint folder's name stands for; 0 for any other name."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[2]) + 1 if match else 0


def is_checkpoint(folder: Path) -> bool:
    """True for a folder that this package wrote, and that is complete.

    The direct engine gives it its name last, NeMo's takes a mark away last.
    """
    has_parts = (folder / "context" / "model.json").is_file() and (folder / "weights").is_dir()
    return has_parts and not is_unfinished(folder)


def is_unfinished(folder: Path) -> bool:
    """Whether NeMo marks the folder as one that is being written or removed."""
    return folder.with_name(folder.name + _UNFINISHED).exists()


def remove_unfinished(checkpoints: Path) -> None:
    """Removes what a killed run of NeMo's left half in a folder of checkpoints."""
    for mark in checkpoints.glob(f"*{_UNFINISHED}"):
        files.remove(mark.with_name(mark.name.removesuffix(_UNFINISHED)))
        files.remove(mark)


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
        CheckpointError: the file is damaged.
        UnreadableCheckpointError: it is missing, or cannot be read.
    """
    fix = "restore the checkpoint"
    return files.read_json(path, CheckpointError, fix, UnreadableCheckpointError)


def write_context(
    checkpoint: Path,
    model: ModelConfig,
    data: TrainingData | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint's ``context`` folder."""
    folder = checkpoint / "context"
    folder.mkdir(parents=True, exist_ok=True)
    if data is not None:
        write_data(checkpoint, data)
    if state is not None:
        files.write_json(folder / "state.json", state)
    files.write_json(folder / "model.json", model.to_json())


def data_path(checkpoint: Path) -> Path:
    """Where a checkpoint says what it was trained on."""
    return checkpoint / "context" / "data.json"


def write_data(checkpoint: Path, data: TrainingData) -> None:
    """Writes what a checkpoint was trained on, beside whatever its ``context`` holds."""
    path = data_path(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, data.to_json())


def read_model_config(checkpoint: Path) -> ModelConfig:
    """The model's numbers of one of our checkpoints."""
    return ModelConfig.from_json(read_json(checkpoint / "context" / "model.json"))


def read_data(checkpoint: Path) -> TrainingData | None:
    """What the checkpoint was trained on; None where it was never trained here.

    Raises:
        CheckpointError: the record is damaged.
    """
    path = data_path(checkpoint)
    return TrainingData.from_json(read_json(path), str(path)) if path.is_file() else None
