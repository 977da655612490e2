"""Conversion of a checkpoint into another format.

Flows in: any model path that ``open_source`` reads. Flows out: a folder in one of the formats that
can be written (``formats/``), and a small ``conversion.json`` that says what it was made from.
Weights keep their dtype and every bit.

A folder appears under its name only when it is complete. No model is built and no GPU is used;
memory is needed for a few tensors of one layer at a time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig, validate
from cosmos_posttrain.checkpoint.formats import registry
from cosmos_posttrain.checkpoint.formats.base import Contents
from cosmos_posttrain.checkpoint.source import CheckpointSource, open_source
from cosmos_posttrain.checkpoint.target_folder import TargetFolder
from cosmos_posttrain.errors import CheckpointError, OutputFolderError

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos_posttrain.checkpoint.weights import WholeWeights


def convert(config: CheckpointConversionConfig) -> None:
    """Converts a checkpoint; see the module's docstring.

    Raises:
        ConfigError: settings that are missing or unknown.
        CheckpointError: the source is missing or damaged, or ``verify`` found a difference.
        OutputFolderError: the target holds something else, or the disk is too small.
    """
    validate(config, launch.world_size())
    source = open_source(config.source, config.model_config)
    if source.path is None:
        raise CheckpointError(
            f"{config.source} has no files to convert; name a checkpoint, for example one that "
            "training wrote."
        )
    target = TargetFolder(config.target, source.path)
    source = _without_heads(source, config.target_format)
    wanted = _identity(source, config)
    if target.is_complete(wanted, config.overwrite):
        if config.verify:
            verify(source.open_weights(), open_source(target.path))
        compared = ", and every tensor equals the source's" if config.verify else ""
        print(f"{config.target} already holds this conversion{compared}; nothing to do.")
        return
    weights = source.open_weights()
    try:
        files.check_free_space(target.path, weights.num_bytes, config.target)
        with target.replacing({"source": str(source.path), **wanted}, config.overwrite) as folder:
            contents = _contents(source, weights, config)
            registry.WRITABLE[config.target_format].write(folder, contents)
            if config.verify:
                verify(weights, open_source(folder))
    except OSError as error:
        raise OutputFolderError(
            f"{config.target} cannot be written ({error.strerror or error}); make room, or choose "
            "another --target."
        ) from error
    compared = ", each compared with the source's" if config.verify else ""
    count, gigabytes = len(weights.tensors()), weights.num_bytes / 1e9
    print(f"wrote {config.target}: {count} tensors, {gigabytes:.3f} GB{compared}.")


def _without_heads(source: CheckpointSource, target_format: str) -> CheckpointSource:
    """The source without its Medusa heads where the target has no place for them."""
    count = source.config.num_medusa_heads
    if not count or registry.WRITABLE[target_format].holds_medusa_heads:
        return source
    print(f"note: {target_format} has no place for the {count} Medusa heads; they are left out.")
    return dataclasses.replace(
        source, config=dataclasses.replace(source.config, num_medusa_heads=0)
    )


def _identity(source: CheckpointSource, config: CheckpointConversionConfig) -> dict[str, Any]:
    """What makes one conversion the same as another: compared with the target's marker."""
    identity: dict[str, Any] = {
        "target_format": config.target_format,
        "source_files": _fingerprint(source),
    }
    if registry.WRITABLE[config.target_format].is_sharded:
        identity["max_shard_gb"] = config.max_shard_gb
    return identity


def _fingerprint(source: CheckpointSource) -> str:
    """Tells sources apart without reading them: their config, and their files' names, sizes, times.

    The config counts because ``--model_config`` may have replaced the folder's own.
    """
    assert source.path is not None
    stats = [(str(path.relative_to(source.path)), path.stat()) for path in source.files()]
    entries: list[Any] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    text = json.dumps([source.config.to_json(), *entries])
    return hashlib.sha256(text.encode()).hexdigest()


def _contents(
    source: CheckpointSource, weights: WholeWeights, config: CheckpointConversionConfig
) -> Contents:
    assert source.path is not None
    _, dtype = next(iter(weights.tensors().values()))
    # What the weights really have; a config.json may say something else.
    params_dtype = str(dtype).removeprefix("torch.")
    return Contents(
        config=dataclasses.replace(source.config, params_dtype=params_dtype),
        weights=weights,
        data=source.data,
        source_name=source.path.name,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
    )


def verify(weights: WholeWeights, written: CheckpointSource) -> None:
    """Reads everything back and compares it bit by bit.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    pairs = zip(weights.reference(), written.open_weights().reference(), strict=True)
    for (name, before), (name_after, after) in pairs:
        assert name == name_after
        if not _are_same(before, after):
            raise CheckpointError(
                f"{name} differs after writing; check the disk and convert again, with --overwrite "
                "where the target is there."
            )


def _are_same(first: Tensor, second: Tensor) -> bool:
    """Compares bits: NaN must equal itself."""
    import torch

    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second)]
    return torch.equal(flat[0], flat[1])
