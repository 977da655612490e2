"""A model's weights from disk and to disk without building the model, on the CPU.

Flows in: an opened ``Source``. Flows out: its tensors one after the other, whole (as at tensor
parallel size 1), in the reference's form or Megatron's; or a ``weights`` folder made of them.

Both streams come in the same order: one key of the torch_dist folder after the other, and layer by
layer within it, because the layers of one kind lie stacked in one tensor there. So reading one of
our checkpoints takes memory for the largest stack only.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.checkpoint.dist import PREFIX, is_dist_checkpoint
from cosmos_posttrain.checkpoint.source import Source, read_pt
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def disk_key(name: str) -> tuple[str, int | None]:
    """Where a Megatron tensor lies in a torch_dist folder.

    Returns:
        The key there, and the tensor's index along its first axis where layers are stacked.
    """
    match = _LAYER.fullmatch(name)
    if match is None:
        return PREFIX + name, None
    return f"{PREFIX}decoder.layers.{match[2]}", int(match[1])


def _names_by_key(config: ModelConfig) -> dict[str, list[str]]:
    """The keys of a torch_dist folder with the Megatron tensors in each, first layer first."""
    names: dict[str, list[str]] = {}
    for name in mapping.megatron_names(config):
        names.setdefault(disk_key(name)[0], []).append(name)
    return names


def read_megatron(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yields (Megatron name, whole tensor) of a source on the CPU, in its own dtype.

    Raises:
        CheckpointError: tensors that are missing, damaged, or of another shape than the config's.
    """
    assert source.path is not None
    if source.kind == "pt":
        state = _checked_pt(source)
        for names in _names_by_key(source.config).values():
            for name in names:
                yield name, mapping.to_megatron(name, state.__getitem__, source.config)
        return
    for key, names in _names_by_key(source.config).items():
        tensor = _read_key(source.path / "weights", key)
        if len(names) > 1 or disk_key(names[0])[1] is not None:
            if tensor.shape[0] != len(names):
                raise CheckpointError(
                    f"{source.path} holds {tensor.shape[0]} layers of {key}, but its config says "
                    f"{len(names)}; restore the checkpoint."
                )
            yield from zip(names, tensor, strict=True)
        else:
            yield names[0], tensor


def read_reference(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Yields (reference name, tensor) of a source on the CPU, in its own dtype.

    Raises:
        CheckpointError: see ``read_megatron``.
    """
    if source.kind == "pt":
        state = _checked_pt(source)
        for names in _names_by_key(source.config).values():
            for name in names:
                yield from ((part, state[part]) for part in mapping.reference_sources(name))
        return
    shapes = mapping.reference_shapes(source.config)
    for name, tensor in read_megatron(source):
        for part, value in mapping.to_reference(name, tensor, source.config).items():
            if tuple(value.shape) != shapes[part]:
                raise CheckpointError(
                    f"{source.path} holds {part} of shape {tuple(value.shape)} instead of "
                    f"{shapes[part]}; its weights and context do not belong together."
                )
            yield part, value


def _checked_pt(source: Source) -> dict[str, Tensor]:
    assert source.path is not None
    state = read_pt(source.path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    mapping.check_reference_shapes(shapes, source.config, str(source.path / "model.pt"))
    return state


def _read_key(folder: Path, key: str) -> Tensor:
    """One whole tensor of a torch_dist folder, whatever layout wrote it."""
    from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

    if not is_dist_checkpoint(folder):
        raise CheckpointError(f"{folder} holds no Megatron torch_dist checkpoint; check the path.")
    reader = FileSystemReader(str(folder))
    try:
        entry = reader.read_metadata().state_dict_metadata.get(key)
        if entry is None:
            raise CheckpointError(f"{folder} lacks {key}; restore the checkpoint.")
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        with warnings.catch_warnings():
            # Reading in this process alone is what no_dist asks for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load({key: tensor}, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is damaged ({key}); restore the checkpoint.") from error
    return tensor


def write_megatron(
    folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes whole Megatron tensors as a torch_dist folder that any layout can load.

    Args:
        folder: an existing empty folder.
        config: the model's numbers.
        tensors: what ``read_megatron`` yields.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    from cosmos_posttrain.distributed import groups
    from cosmos_posttrain.distributed.cpu_device import cpu_device

    groups.initialize(groups.Parallelism())
    state = {}
    for name, tensor in tensors:
        key, layer = disk_key(name)
        stacking = () if layer is None else ((0, layer, config.num_layers),)
        state[name] = ShardedTensor.from_rank_offsets(
            key, tensor, *stacking, prepend_axis_num=len(stacking)
        )
    with cpu_device():
        dist_checkpointing.save(state, str(folder), validate_access_integrity=False)
