"""``megatron``: ``weights/`` (torch_dist) and ``context/``, as training writes them.

A run folder means its newest checkpoint, and a path that differs only in its epoch is accepted.
Of a run with LoRA the factors are merged into the weights as they are read; only resuming the run
reads them as they are.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.formats.base import Contents, WritableFormat
from cosmos_posttrain.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import nn

    from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

WEIGHTS, CONTEXT = "weights", "context"
# Everything that a context says about the model, whoever wrote it.
_CONTEXT_FILES = ("model.json", "data.json", "io.json", "model.yaml")


class MegatronFormat(WritableFormat):
    """A checkpoint of this package."""

    name = "megatron"
    title = "a checkpoint or a run folder of this package"
    parts = (WEIGHTS, CONTEXT)
    holds_medusa_heads = True

    def detect(self, folder: Path) -> Path | None:
        return context.find_checkpoint(folder.parent if folder.name == WEIGHTS else folder)

    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        own = named or context.read_model_config(checkpoint)
        return dataclasses.replace(own, lora=None)

    def data(self, checkpoint: Path) -> context.TrainingData | None:
        return context.read_data(checkpoint)

    def files(self, checkpoint: Path) -> list[Path]:
        return folder_files(checkpoint)

    def open(self, checkpoint: Path, config: ModelConfig) -> TorchDistWeights:
        from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

        lora = context.read_model_config(checkpoint).lora
        return TorchDistWeights(checkpoint / WEIGHTS, config, lora)

    def open_average(self, checkpoint: Path, config: ModelConfig) -> TorchDistWeights:
        from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

        lora = context.read_model_config(checkpoint).lora
        return TorchDistWeights(checkpoint / WEIGHTS, config, lora, averaged=True)

    def load(self, checkpoint: Path, config: ModelConfig, model: nn.Module) -> None:
        from cosmos_posttrain.checkpoint import dist
        from cosmos_posttrain.checkpoint.fill import fill

        weights = self.open(checkpoint, config)  # names everything that does not fit
        if weights.lora is None:
            dist.load(checkpoint / WEIGHTS, model)
        else:
            fill(model, weights.megatron)

    def write(self, folder: Path, contents: Contents) -> None:
        write_folder(folder, contents)


def folder_files(checkpoint: Path) -> list[Path]:
    """The files of a folder with ``weights`` and ``context``."""
    weights = sorted(path for path in (checkpoint / WEIGHTS).iterdir() if path.is_file())
    return weights + [
        path for name in _CONTEXT_FILES if (path := checkpoint / CONTEXT / name).is_file()
    ]


def write_folder(folder: Path, contents: Contents) -> None:
    """Writes ``weights`` and ``context``."""
    from cosmos_posttrain.checkpoint import torch_dist_weights

    weights = contents.weights
    torch_dist_weights.check_stackable(weights.tensors(), contents.config)
    (folder / WEIGHTS).mkdir()
    torch_dist_weights.write_torch_dist(folder / WEIGHTS, contents.config, weights.all_megatron())
    context.write_context(folder, contents.config, contents.data)
