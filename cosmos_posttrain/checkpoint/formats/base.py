"""What a checkpoint format is to the rest of the package. No torch until weights are opened.

Flows in: a folder. Flows out: whether a checkpoint in that format lies there, its numbers, files
and whole tensors; or a checkpoint in that format, made from whole tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cosmos_posttrain.checkpoint.context import TrainingData
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from cosmos_posttrain.checkpoint.weights import WholeWeights


class CheckpointFormat(ABC):
    """A form in which a model lies on disk.

    Attributes:
        name: what it is called on the command line and in records.
        title: what to look for, for the message that there is nothing.
        parts: patterns of a checkpoint's files and folders. A file that matches stands for its
            folder, and all that match are replaced when a conversion overwrites a folder.
        hub_files: patterns of what to fetch of a Hugging Face repository; where nothing matches the
            first of them, it holds no checkpoint in this format. Empty means never to look.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    hub_files: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def detect(self, folder: Path) -> Path | None:
        """The checkpoint that a folder is, holds or belongs to; None if there is none.

        Raises:
            CheckpointError: there is one, but it cannot be read.
        """

    @abstractmethod
    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        """The model's numbers.

        Args:
            checkpoint: what ``detect`` found.
            named: the config that the user gave, which replaces the checkpoint's own.

        Raises:
            CheckpointError: they are missing or damaged.
        """

    def data(self, checkpoint: Path) -> TrainingData | None:
        """What the model was trained on; None where the format does not record it.

        Raises:
            CheckpointError: the record is damaged.
        """
        return None

    @abstractmethod
    def files(self, checkpoint: Path) -> list[Path]:
        """The files that make up the checkpoint, for telling two of them apart."""

    @abstractmethod
    def open(self, checkpoint: Path, config: ModelConfig) -> WholeWeights:
        """The checkpoint's tensors, each read when it is asked for.

        Raises:
            CheckpointError: files are missing or damaged, or do not fit the config.
        """

    def open_average(self, checkpoint: Path, config: ModelConfig) -> WholeWeights:
        """The average over the steps of training, where the checkpoint keeps one.

        Raises:
            CheckpointError: it does not; or see ``open``.
        """
        raise CheckpointError(
            f"{checkpoint} is no checkpoint of a training run, so it keeps no average of the "
            "weights; leave out --weights ema."
        )

    def load(self, checkpoint: Path, config: ModelConfig, model: nn.Module) -> None:
        """Fills a built model's parameters on this rank, at any layout.

        Raises:
            CheckpointError: see ``open``.
        """
        from cosmos_posttrain.checkpoint.fill import fill

        fill(model, self.open(checkpoint, config).megatron)


@dataclass(frozen=True)
class Contents:
    """What a new checkpoint is made of.

    Attributes:
        config: the model's numbers, with the dtype that the weights really have.
        weights: its tensors.
        data: what it was trained on; None where that is not known.
        source_name: the name of the checkpoint that it is made from.
        max_shard_bytes: largest file of a format that writes several.
    """

    config: ModelConfig
    weights: WholeWeights
    data: TrainingData | None
    source_name: str
    max_shard_bytes: int


class WritableFormat(CheckpointFormat):
    """A format that conversion can write.

    Attributes:
        is_sharded: whether ``max_shard_bytes`` has a meaning.
        holds_medusa_heads: whether there is a place for them.
    """

    is_sharded: ClassVar[bool] = False
    holds_medusa_heads: ClassVar[bool] = False

    @abstractmethod
    def write(self, folder: Path, contents: Contents) -> None:
        """Writes a checkpoint into an existing empty folder, a few tensors in memory at a time.

        Raises:
            CheckpointError: the source is damaged, or cannot be written in this format.
            OSError: the disk is full, or fails.
        """
