"""Keeps code out of torch_dist folders: their index and their common file are pickles.

Flows in: the ``.metadata`` of a torch_dist folder. Flows out: its ``Metadata``, made of tables of
names, shapes and file offsets only. torch reads the same file with an unguarded ``pickle.load``, so
every folder passes through ``read_metadata`` first.
"""

from __future__ import annotations

import enum
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cosmos_posttrain.errors import CheckpointError

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"

# What torch's and Megatron's writers put into an index; nothing here runs code of the file's.
_ALLOWED: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed._shard.sharded_tensor.metadata": {
        "MEM_FORMAT_ENCODING",
        "TensorProperties",
    },
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"dict", "frozenset", "list", "set", "tuple"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


def _enum_member(kind: Any, name: str) -> Any:
    """What some Python versions pickle the members of an enumeration with ``getattr`` for."""
    if isinstance(kind, enum.EnumMeta) and name in kind.__members__:
        return kind.__members__[name]
    raise pickle.UnpicklingError("builtins.getattr is not allowed")


class _GuardedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module == "torch":
            # dtypes are stored by name; torch.Size is the type of shapes.
            value = getattr(torch, name, None)
            if name == "Size" or isinstance(value, torch.dtype):
                return value
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def read_metadata(folder: Path) -> Any:
    """The index of a torch_dist folder (``torch.distributed.checkpoint.metadata.Metadata``).

    Raises:
        CheckpointError: the index is missing, damaged, or asks for anything but tables.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _GuardedUnpickler(file).load()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; restore the checkpoint.") from error
    except pickle.UnpicklingError as error:
        if "is not allowed" not in str(error):
            raise CheckpointError(
                f"{path} is damaged ({error}); restore the checkpoint."
            ) from error
        raise CheckpointError(
            f"{path} holds more than tables ({error}) and was not executed; use a checkpoint from "
            "a source that you trust."
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise CheckpointError(f"{path} is damaged; restore the checkpoint.") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} is not a torch_dist index; restore the checkpoint.")
    for info in metadata.storage_data.values():
        name = str(info.relative_path)
        if Path(name).name != name:
            raise CheckpointError(f"{path} points outside its folder ({name}); it was not read.")
    return metadata


def check_folder(folder: Path) -> Any:
    """Makes sure that Megatron can read the folder without executing anything in it.

    Returns:
        The index.

    Raises:
        CheckpointError: see ``read_metadata``; or ``common.pt`` holds more than plain values.
    """
    import torch

    metadata = read_metadata(folder)
    common = folder / COMMON_FILE
    try:
        torch.load(common, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{common} is missing; restore the checkpoint.") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{common} holds more than plain values and was not executed; use a checkpoint from a "
            "source that you trust."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{common} is damaged; restore the checkpoint.") from error
    return metadata


def check_tensors(folder: Path, index: Any, keys: Iterable[str]) -> None:
    """Makes sure that what is about to be loaded is tensors: other objects are pickles.

    Raises:
        CheckpointError: names the first key that is something else.
    """
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    for key in keys:
        if isinstance(index.state_dict_metadata.get(key), BytesStorageMetadata):
            raise CheckpointError(
                f"{folder} holds a pickled object instead of a tensor as {key}, which was not "
                "executed; use a checkpoint from a source that you trust."
            )
