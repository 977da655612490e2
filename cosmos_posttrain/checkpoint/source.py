"""Finds out what a model path is and reads it.

Flows in: a path as users give it. Flows out: a ``Source`` that knows the model's numbers and the
contract of its data, and that loads its weights into a built model at any layout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import hub
from cosmos_posttrain.checkpoint import context, infer_config, nemo_context
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.presets import PRESETS, preset

if TYPE_CHECKING:
    from cosmos_posttrain.models.builder import CosmosGPTModel

# What to ask a Hugging Face repository for, in this order, until a model is there.
HUB_FORMS = (
    ("model.pt", "config.json"),
    ("model*.safetensors", "model.safetensors.index.json", "config.json"),
    ("nemo/*",),
)
ZARR_SCRIPT = "scripts/convert_zarr_checkpoint.py"


@dataclass(frozen=True)
class Source:
    """A model somewhere.

    Attributes:
        path: where it lies; None for fresh weights.
        kind: ``random``, ``pt``, ``safetensors``, ``megatron`` (of this package), ``nemo`` or
            ``torch_dist`` (Megatron-LM's).
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

    @property
    def weights(self) -> Path:
        """The torch_dist folder of a source that has one."""
        assert self.path is not None and self.kind in ("megatron", "nemo", "torch_dist")
        return self.path if self.kind == "torch_dist" else self.path / "weights"

    def load_weights(self, model: CosmosGPTModel) -> None:
        """Fills a built model's parameters on this rank.

        Raises:
            CheckpointError: the weights are damaged or do not fit.
        """
        if self.kind == "megatron":
            from cosmos_posttrain.checkpoint import dist, plain

            plain.open_weights(self)  # names everything that does not fit; Megatron does not
            dist.load(self.weights, model)
        elif self.kind != "random":
            from cosmos_posttrain.checkpoint import plain
            from cosmos_posttrain.checkpoint.fill import fill

            fill(model, plain.open_weights(self).megatron)


def open_source(
    path: str | Path,
    vocab_size: int | None = None,
    latent_shape: LatentShape | None = None,
    model_config: str | None = None,
) -> Source:
    """Finds out what ``path`` is; reads configs only.

    Args:
        path: ``random:<size>`` or ``tiny``, a Hugging Face id, a folder with ``model.pt`` or
            safetensors and ``config.json`` (or the file itself), one of our checkpoints, a run
            folder, a NeMo 2 folder, or a Megatron torch_dist folder.
        vocab_size: vocabulary of fresh weights; None means the size's own.
        latent_shape: the grid to build the model for; None means the checkpoint's own.
        model_config: a ``config.json`` or a size, for folders that do not say what they hold.

    Raises:
        CheckpointError: nothing there that could be read.
        UserError: the path does not exist.
    """
    text = str(path)
    name = text.removeprefix("random:")
    if text.startswith("random:") or (text in PRESETS and not Path(text).exists()):
        return Source(None, "random", preset(name, vocab_size, latent_shape))
    named = infer_config.named_config(model_config) if model_config else None
    source = _open_folder(_local(text), named)
    if latent_shape is not None:
        config = dataclasses.replace(source.config, latent_shape=latent_shape)
        source = dataclasses.replace(source, config=config)
    return source


def _local(text: str) -> Path:
    """A local path for any spelling; downloads what a Hugging Face id names."""
    if not Path(text).exists():
        # A checkpoint path that differs from an existing one only in its epoch.
        text = str(context.find_checkpoint(Path(text)) or text)
    if not hub.looks_like_hub_id(text):
        return hub.resolve(text)
    for patterns in HUB_FORMS:
        folder = hub.resolve(text, patterns)
        if any(next(folder.glob(pattern), None) for pattern in patterns[:1]):
            return folder
    raise CheckpointError(
        f"{text} holds no model: neither model.pt, nor safetensors, nor a nemo folder."
    )


def _is_part_of_a_model(file: Path) -> bool:
    """Whether a file may be given in place of its folder."""
    names = ("model.pt", "config.json", "model*.safetensors", "model.safetensors.index.json")
    return any(file.match(name) for name in names)


def _open_folder(path: Path, named: ModelConfig | None) -> Source:
    if path.is_file() and not _is_part_of_a_model(path):
        raise CheckpointError(
            f"{path} is a file of another name than model.pt or model.safetensors; name it so, "
            "with its config.json beside it, and give the folder."
        )
    folder = path.parent if path.is_file() else path
    checkpoint = context.find_checkpoint(folder.parent if folder.name == "weights" else folder)
    if checkpoint is not None:
        config = named or context.read_model_config(checkpoint)
        return Source(checkpoint, "megatron", config, context.read_data(checkpoint))
    if (folder / "model.pt").is_file():
        return Source(folder, "pt", named or _config_beside(folder, "a model.pt"))
    if any((folder / n).is_file() for n in ("model.safetensors", "model.safetensors.index.json")):
        return Source(folder, "safetensors", named or _config_beside(folder, "safetensors"))
    source = _open_torch_dist(folder, named)
    if source is not None:
        return source
    raise CheckpointError(
        f"{path} holds no model: neither model.pt or safetensors with config.json, nor a "
        "checkpoint of this package, NeMo or Megatron (weights/ and context/), nor a run folder "
        "with checkpoints in it."
    )


def _config_beside(folder: Path, what: str) -> ModelConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has {what} but no config.json; copy the one that belongs to it there, or "
            "give --model_config."
        )
    return infer_config.read_reference_config(folder / "config.json")


def _open_torch_dist(folder: Path, named: ModelConfig | None) -> Source | None:
    """A NeMo 2 folder, the folder around it, its ``weights``, or one of Megatron-LM's."""
    candidates = [folder / "nemo", folder]
    candidates += [folder.parent] if folder.name == "weights" else []
    for nemo in candidates:
        if nemo_context.has_context(nemo):
            if not (nemo / "weights").is_dir():
                raise CheckpointError(
                    f"{nemo} is a NeMo checkpoint without weights/; copy or download it again."
                )
            _check_form(nemo / "weights")
            known = nemo_context.read(nemo) if named is None else {}
            return _inferred(nemo, "nemo", known, named)
    for plain in (folder, folder / "weights", *_newest_iteration(folder)):
        if (plain / "metadata.json").is_file() or next(plain.glob("*.distcp"), None):
            _check_form(plain)
            beside = [f / "config.json" for f in (plain, plain.parent)]
            for path in beside if named is None else []:
                if path.is_file():
                    named = infer_config.read_reference_config(path)
                    break
            return _inferred(plain, "torch_dist", {}, named)
    return None


def _newest_iteration(folder: Path) -> list[Path]:
    """Megatron-LM's save folder names its newest checkpoint in a text file."""
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return []
    iteration = tracker.read_text(encoding="utf-8").strip()
    return [folder / f"iter_{int(iteration):07d}"] if iteration.isdecimal() else []


def _check_form(weights: Path) -> None:
    """Refuses zarr, and folders that hold no weights."""
    from cosmos_posttrain.checkpoint.torch_dist import is_torch_dist

    if any(weights.glob("*/.zarray")):
        raise CheckpointError(
            f"{weights} is in Megatron's old zarr format; convert it with {ZARR_SCRIPT}, then give "
            "the folder that it wrote."
        )
    if not is_torch_dist(weights):
        raise CheckpointError(
            f"{weights} holds no Megatron torch_dist weights (.metadata and *.distcp); copy or "
            "download it again."
        )


def _inferred(folder: Path, kind: str, known: dict[str, Any], named: ModelConfig | None) -> Source:
    """A foreign torch_dist folder, with the numbers that its context and shapes tell."""
    from cosmos_posttrain.checkpoint import plain
    from cosmos_posttrain.checkpoint.torch_dist import TorchDistReader

    weights = folder / "weights" if kind == "nemo" else folder
    reader = TorchDistReader(weights)
    config = named or infer_config.from_shapes(plain.model_shapes(reader), known, str(folder))
    dtypes = {reader.dtypes[key] for key in reader.shapes if key.endswith("linear_fc2.weight")}
    params_dtype = str(min(dtypes, key=str, default=config.params_dtype)).removeprefix("torch.")
    return Source(folder, kind, dataclasses.replace(config, params_dtype=params_dtype))
