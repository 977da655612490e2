"""A model in a torch_dist folder, whoever wrote it: this package, NeMo or Megatron-LM.

Flows in: a ``weights`` folder. Flows out: its model's tensors (``WholeWeights``) and, where no
config says them, its numbers. And the other way round: whole tensors become such a folder.

LoRA's factors, where a run of this package has them beside the weights, are merged into these.

Writers differ in the prefix of the keys, in norms that stand alone or are named by the layer that
they are fused into, in layers that are stacked or single, and in the rows that pad the vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint import infer_config, lora_factors, mapping
from cosmos_posttrain.checkpoint.tensor_bytes import Tensors
from cosmos_posttrain.checkpoint.torch_dist import (
    AVERAGE,
    PREFIX,
    STATE,
    TorchDistReader,
    TorchDistWriter,
    is_torch_dist,
)
from cosmos_posttrain.checkpoint.weights import WholeWeights
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.lora_config import LoraConfig

ZARR_SCRIPT = "scripts/convert_zarr_checkpoint.py"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# Norms that stand alone in Megatron's local layer spec, and their fused names.
NORMS_ALONE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# What belongs to the model in a torch_dist folder, behind the prefix; the rest is optimizer state.
_ROOTS = ("embedding.", "decoder.", "output_layer.")
_EXTRA_STATE = "_extra_state"


def disk_key(name: str, prefix: str = PREFIX) -> tuple[str, int | None]:
    """Where a Megatron tensor lies in a torch_dist folder.

    Returns:
        The key there, and the tensor's index along its first axis where layers are stacked.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return prefix + name, None
    return f"{prefix}decoder.layers.{match[2]}", int(match[1])


def check_form(weights: Path) -> None:
    """Refuses zarr, and folders that hold no weights.

    Raises:
        CheckpointError: says what to do.
    """
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


def config_from_tensors(
    weights: Path, known: dict[str, Any], named: ModelConfig | None, where: Path
) -> ModelConfig:
    """The numbers of a foreign model: what is known of it, and what its tensors tell.

    Args:
        weights: the torch_dist folder.
        known: numbers in the reference's field names.
        named: the config that the user gave; it counts before everything else.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: the index is damaged, or there are numbers that nothing tells.
    """
    reader = TorchDistReader(weights)
    config = named or infer_config.from_shapes(_stacked(model_shapes(reader)), known, str(where))
    dtypes = {reader.dtypes[key] for key in reader.shapes if key.endswith("linear_fc2.weight")}
    params_dtype = str(min(dtypes, key=str, default=config.params_dtype)).removeprefix("torch.")
    return dataclasses.replace(config, params_dtype=params_dtype)


def model_shapes(reader: TorchDistReader) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors in a torch_dist folder, without the prefix of their keys."""
    prefix = _prefix(reader)
    names = {key.removeprefix(prefix): shape for key, shape in reader.shapes.items()}
    return {
        name: shape
        for name, shape in names.items()
        if name.startswith(_ROOTS) and _EXTRA_STATE not in name
    }


def _stacked(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same shapes where every kind of tensor holds all layers, whichever way they lie."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            result[name] = shape
        else:
            inner = f"decoder.layers.{match[2]}"
            num_layers = max(int(match[1]) + 1, result.get(inner, (0,))[0])
            result[inner] = (num_layers, *shape)
    return result


def _prefix(reader: TorchDistReader) -> str:
    """``module.`` in NeMo's folders and ours, nothing in Megatron-LM's."""
    return PREFIX if any(key.startswith(PREFIX + "decoder.") for key in reader.shapes) else ""


class TorchDistWeights(WholeWeights):
    """The model of a torch_dist folder.

    Args:
        folder: the ``weights`` folder.
        config: the model's numbers.
        lora: what is beside the weights, to be merged into them.
        averaged: give of every weight that was trained its average over the steps.

    Raises:
        CheckpointError: the index is damaged, or tensors are missing, surplus or misshapen; all of
            them are named.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        lora: LoraConfig | None = None,
        averaged: bool = False,
    ) -> None:
        self.config, self.lora, self._folder = config, lora, folder
        self._averaged = averaged
        self._reader = TorchDistReader(folder)
        self._prefix = _prefix(self._reader)
        self._reference_shapes = mapping.reference_shapes(config)
        names = mapping.megatron_names(config)
        self._places = {name: self._place(name) for name in names}
        self._factors = {
            name: tuple(self._place(factor) for factor in factors)
            for name in names
            if lora is not None and (factors := lora_factors.factor_names(name, lora))
        }
        self._check()

    def _place(self, name: str) -> tuple[str, int | None]:
        """Key and layer of a tensor; a key that is not there where nothing fits."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return self._prefix + name, None
        number, rest = match.groups()
        for inner in (rest, NORMS_ALONE.get(rest, rest)):
            stacked = f"{self._prefix}decoder.layers.{inner}"
            if stacked in self._reader.shapes:
                return stacked, int(number)
            single = f"{self._prefix}decoder.layers.{number}.{inner}"
            if single in self._reader.shapes:
                return single, None
        return f"{self._prefix}decoder.layers.{rest}", int(number)

    def _expected_shape(self, name: str) -> tuple[int, ...]:
        def fetch(part: str) -> Tensor:
            return torch.empty(self._reference_shapes[part], device="meta")

        return tuple(mapping.to_megatron(name, fetch, self.config).shape)

    def _check(self) -> None:
        """Names everything that does not fit."""
        shapes, missing, wrong = self._reader.shapes, set[str](), set[str]()
        for name, (key, layer) in self._places.items():
            if key not in shapes:
                missing.add(key)
                continue
            wanted = self._expected_shape(name)
            if name in VOCABULARY:
                # Rows that pad the vocabulary are the writer's choice.
                (part,) = mapping.reference_sources(name)
                rows = self._reference_shapes[part][0]
                wanted = (max(shapes[key][0], rows), *wanted[1:])
            if layer is not None:
                wanted = (self.config.num_layers, *wanted)
            if shapes[key] != wanted:
                wrong.add(f"has {key} of shape {shapes[key]} instead of {wanted}")
        used = {key for key, _ in self._places.values()}
        for name, factors in self._factors.items():
            assert self.lora is not None
            sizes = lora_factors.factor_shapes(name, self._expected_shape(name), self.lora)
            for (key, layer), size in zip(factors, sizes, strict=True):
                used.add(key)
                wanted = size if layer is None else (self.config.num_layers, *size)
                if key not in shapes:
                    missing.add(key)
                elif shapes[key] != wanted:
                    wrong.add(f"has {key} of shape {shapes[key]} instead of {wanted}")
        surplus = {self._prefix + name for name in model_shapes(self._reader)} - used
        objects = missing & self._reader.objects
        missing -= objects
        problems = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        if objects:
            names = ", ".join(sorted(objects))
            problems.append(
                f"has a pickled object instead of a tensor as {names}, which was not executed"
            )
        problems += [f"has surplus {', '.join(sorted(surplus))}"] if surplus else []
        problems += sorted(wrong)
        if problems:
            raise CheckpointError(
                f"{self._folder} does not fit its config: it {'; '.join(problems)}."
            )
        if self._averaged and not any(_average(key) in shapes for key in used):
            raise CheckpointError(
                f"{self._folder} keeps no average of the weights; train with --ema_decay, or leave "
                "out --weights ema."
            )

    def _read(self, key: str, layer: int | None) -> Tensor:
        """A tensor, or its average in the tensor's dtype; what is frozen has none."""
        if not self._averaged or _average(key) not in self._reader.shapes:
            return self._reader.read(key, layer)
        return self._reader.read(_average(key), layer).to(self._reader.dtypes[key])

    def megatron(self, name: str) -> Tensor:
        key, layer = self._places[name]
        tensor = self._read(key, layer)
        if name in self._factors:
            assert self.lora is not None
            a, b = (self._read(*place) for place in self._factors[name])
            return lora_factors.merged(tensor, a, b, self.lora)
        wanted = self._expected_shape(name)
        if name in VOCABULARY and tuple(tensor.shape) != wanted:
            (part,) = mapping.reference_sources(name)
            real = tensor[: self._reference_shapes[part][0]]
            tensor = torch.nn.functional.pad(real, (0, 0, 0, wanted[0] - real.shape[0]))
        return tensor

    def reference(self) -> Iterator[tuple[str, Tensor]]:
        for name in mapping.megatron_names(self.config):
            yield from mapping.to_reference(name, self.megatron(name), self.config).items()

    def tensors(self) -> Tensors:
        return {
            part: (self._reference_shapes[part], self._reader.dtypes[key])
            for name, (key, _) in self._places.items()
            for part in mapping.reference_sources(name)
        }


def _average(key: str) -> str:
    """Where the average of a tensor lies."""
    return f"{STATE}{AVERAGE}.{key}"


def check_stackable(tensors: Tensors, config: ModelConfig) -> None:
    """torch_dist stacks the layers of one kind in one tensor, so they must be of one dtype.

    Raises:
        CheckpointError: names everything that is not.
    """
    kinds: dict[str, dict[torch.dtype, list[str]]] = {}
    for name in mapping.megatron_names(config):
        for part in mapping.reference_sources(name):
            by_dtype = kinds.setdefault(disk_key(name)[0], {})
            by_dtype.setdefault(tensors[part][1], []).append(part)
    mixed = [
        " and ".join(f"{', '.join(names)} in {dtype}" for dtype, names in by_dtype.items())
        for by_dtype in kinds.values()
        if len(by_dtype) > 1
    ]
    if mixed:
        raise CheckpointError(
            f"the source has {'; '.join(mixed)}, which Megatron keeps in one tensor; convert it to "
            "pt or safetensors, or give them one dtype."
        )


def write_torch_dist(
    folder: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    prefix: str = PREFIX,
    common: dict[str, Any] | None = None,
) -> None:
    """Writes whole Megatron tensors as a torch_dist folder that any layout can load.

    Args:
        folder: an existing empty folder.
        config: the model's numbers.
        tensors: what ``WholeWeights.all_megatron`` yields; each is written before the next is
            asked for.
        prefix: of the keys.
        common: plain values that belong to no tensor.
    """
    writer = TorchDistWriter(folder)
    try:
        for name, tensor in tensors:
            key, layer = disk_key(name, prefix)
            writer.add(key, tensor, layer, config.num_layers)
        writer.finish(common)
    finally:
        writer.close()
