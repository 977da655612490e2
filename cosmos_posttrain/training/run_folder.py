"""The run folder: what a run writes, where, and how it is found again.

    LOG_DIR/default/config.yaml                              resolved config
    LOG_DIR/default/metrics.jsonl                            one JSON object per step
    LOG_DIR/default/tb_logs/                                 TensorBoard
    LOG_DIR/default/checkpoints/epoch=E-step=S/weights       Megatron torch_dist
    LOG_DIR/default/checkpoints/epoch=E-step=S/context       model, data, state, config

A checkpoint is written under a hidden name and renamed when all ranks are done, so a killed run
leaves either a whole checkpoint or none.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint import context, dist
from cosmos_posttrain.config import to_yaml
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError, OutputFolderError
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.optimizer import CheckpointableOptimizer


@dataclass(frozen=True)
class Progress:
    """How far a run is: completed optimizer steps, and clips consumed by them."""

    completed_steps: int = 0
    consumed_samples: int = 0

    def epoch(self, num_clips: int) -> int:
        """Passes over the training clips completed before the last step's last clip."""
        return max(self.consumed_samples - 1, 0) // num_clips


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
        self.data = data

    @property
    def metrics_path(self) -> Path:
        """One JSON object per step."""
        return self.run / "metrics.jsonl"

    def newest(self) -> Path | None:
        """The checkpoint to resume from; None for a new run.

        Raises:
            OutputFolderError: the folder holds something else than a run.
            ConfigError: the run was trained on other data.
        """
        if self.log_dir.exists() and not self.log_dir.is_dir():
            raise OutputFolderError(f"--log_dir {self.log_dir} is a file; name a folder.")
        known = self.run.is_dir() and any(
            (self.run / name).exists() for name in ("config.yaml", "checkpoints")
        )
        if self.log_dir.is_dir() and any(self.log_dir.iterdir()) and not known:
            raise OutputFolderError(
                f"--log_dir {self.log_dir} holds something else than a run of this script; name "
                "an empty or new folder."
            )
        checkpoints = context.list_checkpoints(self.log_dir)
        if not checkpoints:
            return None
        self._check_same_data(checkpoints[-1])
        return checkpoints[-1]

    def _check_same_data(self, checkpoint: Path) -> None:
        before = context.read_data(checkpoint) or context.TrainingData()
        names = ("contract", "dataset", "split")
        different = [name for name in names if getattr(before, name) != getattr(self.data, name)]
        if different:
            raise ConfigError(
                f"the run in {self.log_dir} was trained on other data (its "
                f"{' and '.join(different)} differ); give the same --data_path, --split_string "
                "and --seed, or a new --log_dir to start a run from one of its checkpoints."
            )
        self.record_transfer(before.embedding_transfer)

    def record_transfer(self, described: dict[str, Any] | None) -> None:
        """Keeps in all checkpoints of the run how the rows of its tokens began."""
        self.data = dataclasses.replace(self.data, embedding_transfer=described)

    def start(self, config: TrainConfig, resumed: Progress) -> None:
        """Makes the folder, saves the config and removes what a killed run left."""
        if launch.rank() == 0:
            (self.run / "checkpoints").mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(self.run / "checkpoints")
            files.write_text(self.run / "config.yaml", to_yaml(config))
        groups.barrier()

    def save(
        self,
        config: TrainConfig,
        model: CosmosGPTModel,
        optimizer: CheckpointableOptimizer,
        progress: Progress,
        num_clips: int,
    ) -> Path:
        """Writes a checkpoint; every rank takes part. Returns its path."""
        name = context.checkpoint_name(progress.epoch(num_clips), progress.completed_steps)
        target = self.run / "checkpoints" / name
        temporary = files.temporary_path(target, is_shared=True)
        if launch.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / "weights").mkdir(parents=True)
        groups.barrier()
        dist.save(temporary / "weights", model, optimizer)
        if launch.rank() == 0:
            state = {
                "completed_steps": progress.completed_steps,
                "consumed_samples": progress.consumed_samples,
            }
            context.write_context(temporary, model.model_config, self.data, state)
            files.write_text(temporary / "context" / "config.yaml", to_yaml(config))
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        groups.barrier()
        return target

    def restore(
        self,
        checkpoint: Path,
        model: CosmosGPTModel,
        optimizer: CheckpointableOptimizer,
        schedule: Any,
    ) -> Progress:
        """Loads weights, optimizer and schedule; any layout reads any other."""
        state = context.read_json(checkpoint / "context" / "state.json")
        dist.load(checkpoint / "weights", model, optimizer)
        schedule.step(increment=state["completed_steps"])
        return Progress(state["completed_steps"], state["consumed_samples"])
