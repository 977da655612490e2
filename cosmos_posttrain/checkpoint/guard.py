"""Keeps code out of torch_dist folders: their index and their common file are pickles.

Flows in: the ``.metadata`` of a torch_dist folder, and its common values. Flows out: its
``Metadata``, made of tables of names, shapes and file offsets only, and plain values. torch reads
the same file with an unguarded ``pickle.load``, so every folder passes through ``read_metadata``
first.
"""

from __future__ import annotations

import enum
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

from cosmos_posttrain.checkpoint.reading import FileWindow, refusal
from cosmos_posttrain.errors import CheckpointError, UnreadableCheckpointError

METADATA_FILE = ".metadata"
COMMON_FILE = "common.pt"
# megatron-core from 0.19 on puts what others keep in common.pt among the pieces, under this key.
COMMON_OBJECT = "common_state/shard_0_1"

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

# megatron-core up to 0.15 (so NeMo 2) has its own names for two of torch's tables.
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_RENAMED = {
    "MCoreMetadata": ("torch.distributed.checkpoint.metadata", "Metadata"),
    "MCoreSavePlan": ("torch.distributed.checkpoint.planner", "SavePlan"),
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
        if module == _MEGATRON and name in _RENAMED:
            return super().find_class(*_RENAMED[name])
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def read_metadata(folder: Path) -> Any:
    """The index of a torch_dist folder (``torch.distributed.checkpoint.metadata.Metadata``).

    Raises:
        CheckpointError: the index is damaged, or asks for anything but tables.
        UnreadableCheckpointError: it is missing, or cannot be read.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = folder / METADATA_FILE
    data = _read(path)
    try:
        metadata = _GuardedUnpickler(io.BytesIO(data)).load()
    except MemoryError as error:
        raise unreadable(str(path), error) from error
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
    try:
        if not isinstance(metadata, Metadata):
            raise TypeError("no index")
        _check_tables(path, metadata)
    except (TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a torch_dist index ({error}); restore the checkpoint."
        ) from error
    return metadata


def _read(path: Path, offset: int = 0, length: int = -1) -> bytes:
    """A small file, or a part of one.

    Raises:
        UnreadableCheckpointError: it is missing, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except FileNotFoundError as error:
        raise UnreadableCheckpointError(f"{path} is missing; restore the checkpoint.") from error
    except (OSError, MemoryError) as error:
        raise unreadable(str(path), error) from error


def unreadable(where: str, error: BaseException) -> UnreadableCheckpointError:
    """The error for a file that the system refuses.

    Args:
        where: what to call it.
        error: what the system said.
    """
    return UnreadableCheckpointError(
        f"{where} cannot be read: {refusal(error) or error}; give the same command again when it "
        "can be."
    )


def _check_tables(path: Path, metadata: Any) -> None:
    """Makes sure that the index's tables hold what torch expects there.

    Raises:
        CheckpointError: a piece lies outside the folder.
        TypeError, AttributeError, ValueError: anything else that is wrong.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            for chunk in entry.chunks:
                axes = zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
                if any(low < 0 or size < 0 or low + size > whole for low, size, whole in axes):
                    raise ValueError(f"a piece of {key} lies outside it")
    for index, info in metadata.storage_data.items():
        name = str(info.relative_path)
        if Path(name).name != name:
            raise CheckpointError(f"{path} points outside its folder ({name}); it was not read.")
        if min(info.offset, info.length) < 0:
            raise ValueError(f"{index.fqn} has no place")


def load(file: Path | FileWindow, where: str, damaged: str) -> Any:
    """``torch.load`` of plain values and tensors, onto the CPU.

    Args:
        file: a path, which is mapped into memory, or a part of an open file, which is copied.
        where: what to call it in messages.
        damaged: what to say and to advise where it holds something else, without a full stop.

    Raises:
        CheckpointError: the file is damaged, or holds more than that; nothing was executed.
        UnreadableCheckpointError: it cannot be read.
        FileNotFoundError: it does not exist.
    """
    import torch

    is_path = isinstance(file, Path)
    opened: Any = file  # torch asks a file for less than its types say
    try:
        with warnings.catch_warnings():
            # About pickles that torch did not write; they are refused anyway, or plain.
            warnings.simplefilter("ignore")
            return torch.load(opened, map_location="cpu", weights_only=True, mmap=is_path)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file raises whatever its bytes happen to mean
        problem = None if isinstance(file, Path) else file.problem
        size = file.stat().st_size if isinstance(file, Path) else file.length
        if problem is not None or refusal(error, size) is not None:
            raise unreadable(where, problem or error) from error
        if isinstance(error, pickle.UnpicklingError):
            raise CheckpointError(
                f"{where} holds more than tensors and plain values and was not executed; use a "
                "file from a source that you trust."
            ) from error
        raise CheckpointError(f"{where} {damaged}.") from error


def read_common(folder: Path) -> dict[str, Any]:
    """The values that lie beside the tensors of a torch_dist folder.

    They are in ``common.pt``, or in the one object that Megatron puts them into instead.

    Raises:
        CheckpointError: they are damaged, or more than plain values.
        UnreadableCheckpointError: they are missing, or cannot be read.
    """
    path = folder / COMMON_FILE
    stored = None if path.exists() else _common_object(folder)
    if stored is None:
        values = _plain(_read(path), str(path))
    else:
        values = _plain(stored, f"{folder} ({COMMON_OBJECT})")
        if isinstance(values, list) and len(values) == 1:
            values = values[0]
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder} holds no table of common values; restore the checkpoint.")
    return values


def _plain(data: bytes, where: str) -> Any:
    window = FileWindow(io.BytesIO(data), 0, len(data))
    return load(window, where, "is damaged; restore the checkpoint")


def _common_object(folder: Path) -> bytes | None:
    """The bytes of the object with the common values; None where the folder has none.

    Raises:
        CheckpointError: the index is damaged.
        UnreadableCheckpointError: the file that it names is missing, or cannot be read.
    """
    for index, place in read_metadata(folder).storage_data.items():
        if index.fqn == COMMON_OBJECT:
            path = folder / place.relative_path
            return _read(path, place.offset, place.length)
    return None
