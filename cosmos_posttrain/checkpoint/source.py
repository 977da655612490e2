"""Finds out what a model path is and reads it.

Flows in: a path as users give it. Flows out: a ``CheckpointSource`` that knows the model's numbers
and what it was trained on, and that loads its weights into a built model at any layout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain import hub
from cosmos_posttrain.checkpoint import infer_config
from cosmos_posttrain.checkpoint.context import TrainingData
from cosmos_posttrain.checkpoint.formats import registry
from cosmos_posttrain.checkpoint.formats.base import CheckpointFormat
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.presets import PRESETS, preset

if TYPE_CHECKING:
    from torch import nn

    from cosmos_posttrain.checkpoint.weights import WholeWeights


@dataclass(frozen=True)
class CheckpointSource:
    """A model somewhere, found and described; its weights are not read yet.

    Attributes:
        path: where it lies; None for fresh weights.
        format: how it is written there; None for fresh weights.
        config: the model's numbers.
        data: what it was trained on; None where that is not recorded.
        weights: ``last``, or ``ema`` for the average over the steps of training.
    """

    path: Path | None
    format: CheckpointFormat | None
    config: ModelConfig
    data: TrainingData | None = None
    weights: str = "last"

    @property
    def is_fresh(self) -> bool:
        """Whether the weights are fresh ones, which know nothing."""
        return self.path is None

    @property
    def contract(self) -> Contract | None:
        """The contract of the data that the model was trained on; None where it is not known."""
        return None if self.data is None else self.data.contract

    def at_grid(
        self,
        latent_shape: LatentShape | None,
        rope_scaling: str = "none",
        rope_scale: float | None = None,
        vocab_size: int | None = None,
    ) -> CheckpointSource:
        """The same model for another token grid; fresh weights also for another vocabulary.

        Args:
            latent_shape: the grid to build the model for; None means its own.
            rope_scaling: what becomes of positions beyond the grid that the weights know, see
                ``ModelConfig.at_grid``; fresh weights know no grid, nothing is scaled.
            rope_scale: see ``ModelConfig.at_grid``.
            vocab_size: vocabulary of fresh weights; None means the size's own.

        Raises:
            ConfigError: an unknown scaling, or a scale below 1.
        """
        shape = latent_shape or self.config.latent_shape
        config = self.config.at_grid(shape, rope_scaling, rope_scale)
        if self.is_fresh:
            rows = vocab_size or self.config.vocab_size
            config = dataclasses.replace(self.config, latent_shape=shape, vocab_size=rows)
        return dataclasses.replace(self, config=config)

    def for_text(self, context_len: int, context_dim: int) -> CheckpointSource:
        """The same model; fresh weights that take a text take one of this size."""
        if not (self.is_fresh and self.config.is_video2world):
            return self
        config = dataclasses.replace(self.config, context_len=context_len, context_dim=context_dim)
        return dataclasses.replace(self, config=config)

    def files(self) -> list[Path]:
        """The files that make it up; none for fresh weights."""
        if self.format is None or self.path is None:
            return []
        return [path for path in self.format.files(self.path) if path.exists()]

    def open_weights(self) -> WholeWeights:
        """Its tensors, each read when it is asked for, for a source that is not fresh.

        Raises:
            CheckpointError: files are missing or damaged, or tensors missing, surplus or misshapen;
                all of them are named.
        """
        assert self.format is not None and self.path is not None
        is_average = self.weights == "ema"
        return (self.format.open_average if is_average else self.format.open)(
            self.path, self.config
        )

    def load_weights(self, model: nn.Module) -> None:
        """Fills a built model's parameters on this rank; fresh weights stay as they were built.

        Raises:
            CheckpointError: the weights are damaged or do not fit.
        """
        if self.format is not None and self.path is not None:
            self.format.load(self.path, self.config, model)


def open_source(path: str | Path, model_config: str | None = None) -> CheckpointSource:
    """Finds out what ``path`` is; reads configs only.

    Args:
        path: ``random:<size>`` or ``tiny``, a Hugging Face id, a folder with ``model.pt`` or
            safetensors and ``config.json`` (or the file itself), one of our checkpoints, a run
            folder, a NeMo 2 folder, or a Megatron torch_dist folder.
        model_config: a ``config.json`` or a size, for folders that do not say what they hold.

    Raises:
        CheckpointError: nothing there that could be read.
        UserError: the path does not exist.
    """
    text = str(path)
    if text.startswith("random:") or (text in PRESETS and not Path(text).exists()):
        return CheckpointSource(None, None, preset(text.removeprefix("random:")))
    named = infer_config.named_config(model_config) if model_config else None
    local = _local(text)
    if local.is_file() and not registry.is_part(local):
        raise CheckpointError(
            f"{local} is a file of another name than a checkpoint's ({', '.join(registry.parts())})"
            "; rename it, with what belongs to it beside it, and give the folder."
        )
    found = registry.detect(local.parent if local.is_file() else local)
    if found is None:
        raise CheckpointError(f"{local} holds no model: {registry.nothing_found()}.")
    form, checkpoint = found
    config = form.config(checkpoint, named)
    return CheckpointSource(checkpoint, form, config, form.data(checkpoint))


def _local(text: str) -> Path:
    """A local path for any spelling; downloads what a Hugging Face id names."""
    if not Path(text).exists() and (found := registry.detect(Path(text))):
        return found[1]  # a path that differs from an existing one only in its epoch, say
    if not hub.looks_like_hub_id(text):
        return hub.resolve(text)
    for patterns in registry.HUB_FILES:
        folder = hub.resolve(text, patterns)
        if next(folder.glob(patterns[0]), None):
            return folder
    wanted = ", nor ".join(patterns[0] for patterns in registry.HUB_FILES)
    raise CheckpointError(f"{text} holds no model: neither {wanted}.")
