"""Finds out what a model path is and reads it.

Flows in: a path as users give it. Flows out: a ``Source`` that knows the model's numbers and the
contract of its data, and that loads its weights into a built model at any layout.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import hub
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import PRESETS, ModelConfig, from_reference, preset

if TYPE_CHECKING:
    import torch

    from cosmos_posttrain.models.builder import CosmosGPTModel

HUB_PATTERNS = ("model.pt", "config.json")


@dataclass(frozen=True)
class Source:
    """A model somewhere.

    Attributes:
        path: where it lies; None for fresh weights.
        kind: ``random``, ``pt`` or ``megatron``.
        config: the model's numbers.
        data: what it was trained on (``contract`` and more); None where that is not recorded.
    """

    path: Path | None
    kind: str
    config: ModelConfig
    data: dict[str, Any] | None = None

    @property
    def contract(self) -> dict[str, Any] | None:
        """The contract of the data that the model was trained on."""
        return (self.data or {}).get("contract")

    def load_weights(self, model: CosmosGPTModel) -> None:
        """Fills a built model's parameters on this rank.

        Raises:
            CheckpointError: the weights are damaged or do not fit.
        """
        if self.kind == "pt":
            assert self.path is not None
            _load_pt(self.path, self.config, model)
        elif self.kind == "megatron":
            from cosmos_posttrain.checkpoint import dist

            assert self.path is not None
            dist.load(self.path / "weights", model)


def open_source(
    path: str | Path, vocab_size: int | None = None, latent_shape: LatentShape | None = None
) -> Source:
    """Finds out what ``path`` is; reads configs only.

    Args:
        path: ``random:<size>`` or ``tiny``, a Hugging Face id, a folder with ``model.pt`` and
            ``config.json`` (or the ``model.pt`` itself), one of our checkpoints, or a run folder.
        vocab_size: vocabulary of fresh weights; None means the size's own.
        latent_shape: the grid to build the model for; None means the checkpoint's own.

    Raises:
        CheckpointError: nothing there that could be read.
        UserError: the path does not exist.
    """
    text = str(path)
    name = text.removeprefix("random:")
    if text.startswith("random:") or (text in PRESETS and not Path(text).exists()):
        return Source(None, "random", preset(name, vocab_size, latent_shape))
    source = _open_folder(hub.resolve(_allow_other_epoch(text), HUB_PATTERNS))
    if latent_shape is not None:
        config = dataclasses.replace(source.config, latent_shape=latent_shape)
        source = dataclasses.replace(source, config=config)
    return source


def _allow_other_epoch(text: str) -> str:
    """A checkpoint path that differs from an existing one only in its epoch."""
    found = None if Path(text).exists() else context.find_checkpoint(Path(text))
    return str(found or text)


def _open_folder(path: Path) -> Source:
    folder = path.parent if path.is_file() else path
    checkpoint = context.find_checkpoint(folder)
    if checkpoint is not None:
        config = context.read_model_config(checkpoint)
        return Source(checkpoint, "megatron", config, context.read_data(checkpoint))
    if (folder / "model.pt").is_file():
        return Source(folder, "pt", _read_reference_config(folder))
    raise CheckpointError(
        f"{path} holds no model: neither model.pt with config.json, nor a checkpoint of this "
        "package (weights/ and context/), nor a run folder with checkpoints in it."
    )


def _read_reference_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has a model.pt but no config.json; copy the one that belongs to it there."
        )
    try:
        return from_reference(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again.") from error


def read_pt(folder: Path) -> dict[str, torch.Tensor]:
    """Maps the tensors of a ``model.pt`` into memory; executes nothing.

    Raises:
        CheckpointError: the file is truncated, or holds anything but tensors.
    """
    import torch

    path = folder / "model.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and was not executed; use a file from a source that "
            "you trust, saved as a plain state dict."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or truncated; download it again.") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path} is not a flat state dict of tensors; convert it first.")
    return state


def _load_pt(folder: Path, config: ModelConfig, model: CosmosGPTModel) -> None:
    import torch
    from megatron.core import parallel_state

    from cosmos_posttrain.checkpoint import mapping
    from cosmos_posttrain.models.naming import parameters_by_disk_name

    state = read_pt(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    mapping.check_reference_shapes(shapes, config, str(folder / "model.pt"))
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in parameters_by_disk_name(model):
            whole = mapping.to_megatron(name, state.__getitem__, config)
            parameter.copy_(mapping.shard(name, whole, rank, size))
