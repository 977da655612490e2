"""A model's weights from disk and to disk without building the model, on the CPU.

Flows in: an opened ``Source``. Flows out: its tensors one after the other, whole (as at tensor
parallel size 1), in the reference's form or Megatron's; or a ``weights`` folder made of them.

Every tensor is read when it is asked for, and layers of one kind, which lie stacked in one tensor
in torch_dist folders, are read one by one. So the memory needed is that of one layer's largest
tensor, whatever the size of the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint import mapping, pt_file
from cosmos_posttrain.checkpoint.safetensors_file import SafetensorsReader
from cosmos_posttrain.checkpoint.source import Source
from cosmos_posttrain.checkpoint.torch_dist import PREFIX, TorchDistReader, TorchDistWriter
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig

Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# What belongs to the model in a torch_dist folder, behind the prefix; the rest is optimizer state.
_ROOTS = ("embedding.", "decoder.", "output_layer.")
_EXTRA_STATE = "_extra_state"
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# Norms that stand alone in Megatron's local layer spec, and their fused names.
_ALONE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def disk_key(name: str) -> tuple[str, int | None]:
    """Where a Megatron tensor lies in a torch_dist folder.

    Returns:
        The key there, and the tensor's index along its first axis where layers are stacked.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return PREFIX + name, None
    return f"{PREFIX}decoder.layers.{match[2]}", int(match[1])


def model_shapes(reader: TorchDistReader) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors in a torch_dist folder, without the prefix of their keys."""
    prefix = _prefix(reader)
    names = {key.removeprefix(prefix): shape for key, shape in reader.shapes.items()}
    return {
        name: shape
        for name, shape in names.items()
        if name.startswith(_ROOTS) and _EXTRA_STATE not in name
    }


def _prefix(reader: TorchDistReader) -> str:
    """``module.`` in NeMo's folders and ours, nothing in Megatron-LM's."""
    return PREFIX if any(key.startswith(PREFIX + "decoder.") for key in reader.shapes) else ""


class Weights(Protocol):
    """The tensors of a source, in both forms."""

    def megatron(self, name: str) -> Tensor:
        """One whole Megatron tensor, by its name on disk with a global layer number."""
        ...

    def reference(self) -> Iterator[tuple[str, Tensor]]:
        """All reference tensors, in the order of the forward pass."""
        ...

    def tensors(self) -> Tensors:
        """Shape and dtype of all reference tensors, in the same order; reads no weights."""
        ...


def open_weights(source: Source) -> Weights:
    """Opens a source's weights and compares their names and shapes with its config's.

    Raises:
        CheckpointError: files are missing or damaged, or tensors missing, surplus or misshapen; all
            of them are named.
    """
    assert source.path is not None
    if source.kind in ("pt", "safetensors"):
        return _ReferenceWeights(source)
    return _MegatronWeights(source)


class _ReferenceWeights:
    """``model.pt`` and safetensors: the reference's names."""

    def __init__(self, source: Source) -> None:
        assert source.path is not None
        self._config = source.config
        if source.kind == "pt":
            where = source.path / "model.pt"
            state = pt_file.read(where)
            self._read = state.__getitem__
            self._shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
        else:
            where = source.path
            reader = SafetensorsReader(where)
            self._read, self._shapes, self._dtypes = reader.read, reader.shapes, reader.dtypes
        mapping.check_reference_shapes(self._shapes, source.config, str(where))

    def megatron(self, name: str) -> Tensor:
        return mapping.to_megatron(name, self._read, self._config)

    def reference(self) -> Iterator[tuple[str, Tensor]]:
        for name in mapping.reference_names(self._config):
            yield name, self._read(name)

    def tensors(self) -> Tensors:
        names = mapping.reference_names(self._config)
        return {name: (self._shapes[name], self._dtypes[name]) for name in names}


class _MegatronWeights:
    """torch_dist folders of this package, NeMo and Megatron-LM."""

    def __init__(self, source: Source) -> None:
        self._config, self._folder = source.config, source.weights
        self._reader = TorchDistReader(self._folder)
        self._prefix = _prefix(self._reader)
        self._reference_shapes = mapping.reference_shapes(self._config)
        self._places = {name: self._place(name) for name in mapping.megatron_names(self._config)}
        self._check()

    def _place(self, name: str) -> tuple[str, int | None]:
        """Key and layer of a tensor; a key that is not there where nothing fits."""
        match = _LAYER.fullmatch(name)
        if match is None:
            return self._prefix + name, None
        number, rest = match.groups()
        for inner in (rest, _ALONE.get(rest, rest)):
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

        return tuple(mapping.to_megatron(name, fetch, self._config).shape)

    def _check(self) -> None:
        """Names everything that does not fit."""
        shapes, missing, wrong = self._reader.shapes, set[str](), set[str]()
        for name, (key, layer) in self._places.items():
            if key not in shapes:
                missing.add(key)
                continue
            wanted = self._expected_shape(name)
            if name in _VOCABULARY:
                # Rows that pad the vocabulary are the writer's choice.
                (part,) = mapping.reference_sources(name)
                rows = self._reference_shapes[part][0]
                wanted = (max(shapes[key][0], rows), *wanted[1:])
            if layer is not None:
                wanted = (self._config.num_layers, *wanted)
            if shapes[key] != wanted:
                wrong.add(f"has {key} of shape {shapes[key]} instead of {wanted}")
        used = {key for key, _ in self._places.values()}
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

    def megatron(self, name: str) -> Tensor:
        key, layer = self._places[name]
        tensor = self._reader.read(key, layer)
        wanted = self._expected_shape(name)
        if name in _VOCABULARY and tuple(tensor.shape) != wanted:
            (part,) = mapping.reference_sources(name)
            real = tensor[: self._reference_shapes[part][0]]
            tensor = torch.nn.functional.pad(real, (0, 0, 0, wanted[0] - real.shape[0]))
        return tensor

    def reference(self) -> Iterator[tuple[str, Tensor]]:
        for name in mapping.megatron_names(self._config):
            yield from mapping.to_reference(name, self.megatron(name), self._config).items()

    def tensors(self) -> Tensors:
        return {
            part: (self._reference_shapes[part], self._reader.dtypes[key])
            for name, (key, _) in self._places.items()
            for part in mapping.reference_sources(name)
        }


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


def read_megatron(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yields (Megatron name, whole tensor) of a source on the CPU, in its own dtype.

    Raises:
        CheckpointError: tensors that are missing, damaged, or of another shape than the config's.
    """
    weights = open_weights(source)
    for name in mapping.megatron_names(source.config):
        yield name, weights.megatron(name)


def read_reference(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yields (reference name, tensor) of a source on the CPU, in its own dtype.

    Raises:
        CheckpointError: see ``read_megatron``.
    """
    yield from open_weights(source).reference()


def write_megatron(
    folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes whole Megatron tensors as a torch_dist folder that any layout can load.

    Args:
        folder: an existing empty folder.
        config: the model's numbers.
        tensors: what ``read_megatron`` yields; each is written before the next is asked for.
    """
    writer = TorchDistWriter(folder)
    try:
        for name, tensor in tensors:
            key, layer = disk_key(name)
            writer.add(key, tensor, layer, config.num_layers)
        writer.finish()
    finally:
        writer.close()
