"""``torch_dist``: a folder of Megatron-LM's, read only.

``iter_0000100/`` as ``--save`` writes it, the folder with ``latest_checkpointed_iteration.txt``
around it, or any other with an index and ``*.distcp``. It says nothing of the model but its
tensors' shapes; a ``config.json`` beside it or ``--model_config`` says the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.checkpoint import infer_config
from cosmos_posttrain.checkpoint.formats.base import CheckpointFormat
from cosmos_posttrain.models.config import ModelConfig

if TYPE_CHECKING:
    from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

TRACKER = "latest_checkpointed_iteration.txt"
_MAX_DIGITS = 18  # of an iteration


class TorchDistFormat(CheckpointFormat):
    """A distributed checkpoint of Megatron-LM."""

    name = "torch_dist"
    title = "a distributed checkpoint of Megatron-LM"
    parts = ()

    def detect(self, folder: Path) -> Path | None:
        for path in (folder, folder / "weights", *newest_iteration(folder)):
            if (path / "metadata.json").is_file() or next(path.glob("*.distcp"), None):
                return path
        return None

    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        from cosmos_posttrain.checkpoint.torch_dist_weights import check_form, config_from_tensors

        check_form(checkpoint)
        for folder in (checkpoint, checkpoint.parent) if named is None else ():
            if (folder / "config.json").is_file():
                named = infer_config.read_reference_config(folder / "config.json")
                break
        return config_from_tensors(checkpoint, {}, named, checkpoint)

    def files(self, checkpoint: Path) -> list[Path]:
        return sorted(path for path in checkpoint.iterdir() if path.is_file())

    def open(self, checkpoint: Path, config: ModelConfig) -> TorchDistWeights:
        from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

        return TorchDistWeights(checkpoint, config)


def newest_iteration(folder: Path) -> list[Path]:
    """What a save folder names as its newest checkpoint, there or not; empty if it names none."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return []
    iteration = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not iteration.isdecimal() or len(iteration) > _MAX_DIGITS:
        return []
    return [folder / f"iter_{int(iteration):07d}"]
