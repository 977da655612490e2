"""The run folder: what a run writes, where, and how it is found again.

    LOG_DIR/.lock                                            while a run writes here
    LOG_DIR/default/config.yaml                              resolved config
    LOG_DIR/default/launches.jsonl                           one JSON object per start of the run
    LOG_DIR/default/metrics.jsonl                            one JSON object per step
    LOG_DIR/default/tb_logs/                                 TensorBoard
    LOG_DIR/default/checkpoints/epoch=E-step=S/weights       Megatron torch_dist
    LOG_DIR/default/checkpoints/epoch=E-step=S/context       model, data, state, metrics, config
    LOG_DIR/default/damaged_checkpoints/                     what could not be resumed from

A checkpoint is written under a hidden name and renamed when all ranks are done, so a killed run
leaves either a whole checkpoint or none. Rank 0 decides, and writes everything but weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from cosmos_posttrain import environment, files
from cosmos_posttrain.checkpoint import context, dist
from cosmos_posttrain.config import to_yaml
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import (
    CheckpointError,
    ConfigError,
    OutputFolderError,
    SaveError,
    UnreadableCheckpointError,
)
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.fallback import Candidates
from cosmos_posttrain.training.optimizer import CheckpointableOptimizer
from cosmos_posttrain.training.retention import to_remove

METRICS_FILE = "metrics.json"  # the row of the checkpoint's last step, in its context


@dataclass(frozen=True)
class TrainState:
    """How far a run is: completed optimizer steps, and clips consumed by them."""

    completed_steps: int = 0
    consumed_samples: int = 0

    def epoch(self, num_clips: int) -> int:
        """Passes over the training clips completed before the last step's last clip."""
        return max(self.consumed_samples - 1, 0) // num_clips


@dataclass(frozen=True)
class Record:
    """What a checkpoint holds beside its numbers and the data: all plain.

    Attributes:
        model: the model's numbers.
        state: how far the run is, and what callbacks keep.
        row: of the last step.
    """

    model: ModelConfig
    state: dict[str, Any]
    row: dict[str, Any]


class RunFolder:
    """Reads and writes one run folder.

    Args:
        log_dir: the folder.
        data: what the run trains on.

    Attributes:
        data: the same, and what the run's start recorded beside it; goes into every checkpoint.
    """

    def __init__(self, log_dir: str | Path, data: context.TrainingData) -> None:
        self.log_dir = Path(log_dir)
        self.run = self.log_dir / "default"
        self.checkpoints = self.run / "checkpoints"
        self.data = data
        self._held = contextlib.ExitStack()
        self._candidates: Candidates | None = None  # on rank 0

    def open(self) -> Path | None:
        """Holds the folder against other runs and finds the checkpoint to resume from.

        Returns:
            The newest checkpoint that is whole, the same on every rank; None for a new run.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
            OutputFolderError: another run writes there, or the folder holds something else.
            ConfigError: the run was trained on other data.
        """
        newest, self.data = groups.decide(self._open)
        return newest

    def look(self) -> Path | None:
        """As ``open``, but holds nothing, changes nothing, and asks no other rank."""
        self._check()
        newest = Candidates(self.log_dir).newest()
        if newest is not None:
            self.data = self._same_data(newest)
        return newest

    def _open(self) -> tuple[Path | None, context.TrainingData]:
        self._check()
        self._held.enter_context(files.locked(self.log_dir))
        self._candidates = Candidates(self.log_dir)
        newest = self._candidates.newest()
        return newest, self.data if newest is None else self._same_data(newest)

    def _check(self) -> None:
        """Refuses a folder that no run could write to.

        Raises:
            OutputFolderError: it holds something else, or cannot be written to.
        """
        files.check_writable(self.log_dir, "--log_dir")
        known = self.run.is_dir() and any(
            (self.run / name).exists() for name in ("config.yaml", "checkpoints")
        )
        if not known and files.foreign_names(self.log_dir, lambda name: False):
            raise OutputFolderError(
                f"--log_dir {self.log_dir} holds something else than a run of this script; name "
                "an empty or new folder."
            )

    def close(self) -> None:
        """Lets other runs write here again."""
        self._held.close()

    def _same_data(self, checkpoint: Path) -> context.TrainingData:
        before = context.read_data(checkpoint) or context.TrainingData()
        names = ("contract", "dataset", "split", "sampling")
        different = [name for name in names if getattr(before, name) != getattr(self.data, name)]
        if different:
            raise ConfigError(
                f"the run in {self.log_dir} was trained on other data (its "
                f"{' and '.join(different)} differ); give the same --data_path, --split_string "
                "and --seed, or a new --log_dir to start a run from one of its checkpoints."
            )
        return dataclasses.replace(
            self.data,
            embedding_transfer=before.embedding_transfer,
            started_from=before.started_from,
        )

    def record_transfer(self, described: dict[str, Any]) -> None:
        """Keeps in all checkpoints of the run how the rows of its tokens began."""
        self.data = dataclasses.replace(self.data, embedding_transfer=described)

    def record_start(self, started_from: dict[str, Any]) -> None:
        """Keeps in all checkpoints of the run which model it began with."""
        self.data = dataclasses.replace(self.data, started_from=started_from)

    def start(self, config: TrainConfig, num_bytes: int, resumed: Path | None) -> None:
        """Makes the folder, saves the config and removes what a killed run left.

        Args:
            config: the run's.
            num_bytes: of a checkpoint, about.
            resumed: the checkpoint that was loaded; damaged ones after it are moved aside.

        Raises:
            OutputFolderError: the disk cannot hold a checkpoint.
        """
        groups.decide(lambda: self._start(config, num_bytes, resumed))

    def _start(self, config: TrainConfig, num_bytes: int, resumed: Path | None) -> None:
        assert self._candidates is not None
        self._candidates.set_aside(resumed)
        if self.checkpoints.is_dir():
            files.remove_leftovers(self.checkpoints)
            context.remove_unfinished(self.checkpoints)
        files.check_free_space(self.log_dir, self.size(num_bytes), "a checkpoint of this run")
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        files.write_text(self.run / "config.yaml", to_yaml(config))
        self._record_launch()

    def _record_launch(self) -> None:
        """Adds how this start of the run was called and what it runs on."""
        row = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment.describe(),
        }
        with (self.run / context.LAUNCHES_FILE).open("a", encoding="utf-8") as file:
            file.write(files.json_text(row) + "\n")

    def size(self, estimate: int) -> int:
        """Bytes of the newest checkpoint, which the next one will have too; else the estimate."""
        checkpoints = context.list_checkpoints(self.log_dir)
        return files.num_bytes_in(checkpoints[-1]) if checkpoints else estimate

    def make_room(self, name: str, num_bytes: int) -> Path:
        """Begins a checkpoint; every rank takes part. Returns the folder that it is written in.

        Args:
            name: of the checkpoint's folder.
            num_bytes: of a checkpoint, about.

        Raises:
            SaveError: there is no room; older checkpoints are untouched.
        """
        temporary = files.temporary_path(self.checkpoints / name, is_shared=True)
        groups.decide(lambda: self._make_room(temporary, num_bytes))
        return temporary

    def check_room(self, num_bytes: int) -> None:
        """Refuses to begin a checkpoint for which there is no room; for rank 0.

        Args:
            num_bytes: of a checkpoint, about.

        Raises:
            SaveError: there is none; older checkpoints are untouched.
        """
        try:
            files.check_free_space(self.log_dir, self.size(num_bytes), f"{self.checkpoints}")
        except OutputFolderError as error:
            raise SaveError(
                f"no checkpoint was written: {error} The same command then goes on from the "
                "checkpoint before; --keep_last_n keeps fewer."
            ) from error

    def _make_room(self, temporary: Path, num_bytes: int) -> None:
        self.check_room(num_bytes)
        files.remove(temporary)
        (temporary / "weights").mkdir(parents=True)

    def write(
        self, config: TrainConfig, temporary: Path, part: dist.RankPart, record: Record, group: Any
    ) -> None:
        """Writes a checkpoint and gives it its name; every rank takes part.

        Args:
            config: the run's.
            temporary: from ``make_room``.
            part: of this rank.
            record: what else belongs to it.
            group: all ranks, for a thread of its own; None means the usual group.

        Raises:
            SaveError: on every rank, if writing failed; older checkpoints are untouched.
        """

        def complete() -> None:
            self.write_context(config, temporary, record)
            target = temporary.with_name(files.final_name(temporary.name))
            files.remove(target)
            temporary.rename(target)
            self.prune(config)

        try:
            dist.write(temporary / "weights", part, group)
            groups.decide(lambda: _saving(complete, temporary), group=group)
        except SaveError:  # raised on every rank
            groups.decide(lambda: files.remove(temporary), group=group)
            raise

    def write_context(self, config: TrainConfig, checkpoint: Path, record: Record) -> None:
        """Writes what a checkpoint holds beside its numbers; for rank 0.

        ``model.json`` comes last: without it, nobody takes the folder for a checkpoint.
        """
        folder = checkpoint / "context"
        folder.mkdir(exist_ok=True)
        files.write_json(folder / METRICS_FILE, record.row)
        files.write_text(folder / "config.yaml", to_yaml(config))
        context.write_context(checkpoint, record.model, self.data, record.state)

    def record_validation(self, config: TrainConfig, checkpoint: Path, row: dict[str, Any]) -> None:
        """Writes a checkpoint's row again, which now has its validation loss; for rank 0.

        Raises:
            SaveError: it cannot be written.
        """

        def record() -> None:
            files.write_json(checkpoint / "context" / METRICS_FILE, row)
            self.prune(config)

        _saving(record, checkpoint)

    def prune(self, config: TrainConfig) -> None:
        """Removes what need not be kept; for rank 0.

        Each gets a hidden name first, so that none is half.
        """
        checkpoints = context.list_checkpoints(self.log_dir)
        try:
            losses = [_validation_loss(checkpoint) for checkpoint in checkpoints]
        except UnreadableCheckpointError:  # which may be one of the best
            return
        for number in to_remove(losses, config.save_top_k, config.keep_last_n):
            hidden = files.temporary_path(checkpoints[number])
            checkpoints[number].rename(hidden)
            files.remove(hidden)

    def restore(
        self, checkpoint: Path, model: nn.Module, optimizer: CheckpointableOptimizer
    ) -> dict[str, Any]:
        """Loads weights and optimizer, at any layout; returns the state that was saved.

        Raises:
            CheckpointError: on every rank; see ``fall_back``.
            UnreadableCheckpointError: on every rank; it may be whole, and stays where it is.
        """
        dist.load(checkpoint / "weights", model, optimizer)
        return groups.decide(lambda: context.read_json(checkpoint / "context" / "state.json"))

    def fall_back(self, checkpoint: Path, error: CheckpointError) -> Path:
        """The newest whole checkpoint before one that could not be restored.

        Raises:
            CheckpointError: there is none.
        """

        def choose() -> Path:
            assert self._candidates is not None
            return self._candidates.instead_of(checkpoint, str(error))

        return groups.decide(choose)


def _saving(function: Callable[[], None], what: Path) -> None:
    """Calls a function on one rank, where a full disk is a sentence for all.

    Raises:
        SaveError: a file cannot be written.
    """
    try:
        function()
    except OSError as error:
        raise SaveError(
            f"{what} cannot be written ({error.strerror or error}); make room, then give the same "
            "command again."
        ) from error


def _validation_loss(checkpoint: Path) -> float | None:
    """Of a checkpoint's last step; None where it has none, or a damaged one.

    Raises:
        UnreadableCheckpointError: it cannot be read now.
    """
    try:
        return saved_row(checkpoint).get("val_loss")
    except UnreadableCheckpointError:
        raise
    except CheckpointError:
        return None


def saved_row(checkpoint: Path) -> dict[str, Any]:
    """The row of a checkpoint's last step; empty where it has none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = checkpoint / "context" / METRICS_FILE
    return context.read_json(path) if path.is_file() else {}
