"""``model.pt`` files: mapped into memory for reading, written one tensor after the other.

Flows in: a file, or the names, shapes and dtypes of tensors that then arrive in that order. Flows
out: a flat state dict whose tensors lie in the file's pages, or a file that ``torch.load`` reads
(``weights_only``, mapped or not).

``torch.save`` needs all tensors at once. The format is a zip file without compression: a pickle
that names the tensors, and one member per tensor with its bytes; so it is written here directly.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint import guard
from cosmos_posttrain.checkpoint.tensor_bytes import bytes_of
from cosmos_posttrain.errors import CheckpointError

_ROOT = "model"
# Mapped tensors must start where any vector instruction may read; torch uses the same number.
_ALIGNMENT = 64
# Local header, and the fields that zipfile appends for sizes above 4 GB.
_HEADER_BYTES, _ZIP64_BYTES = 30, 20
_PADDING_ID = 0x4246
_STORAGES = {
    torch.bfloat16: "BFloat16Storage",
    torch.float16: "HalfStorage",
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
}


def read(path: Path) -> dict[str, Tensor]:
    """Maps the tensors of a ``model.pt`` into memory; executes nothing.

    Raises:
        CheckpointError: the file is truncated, or holds anything but tensors of weights.
    """
    state = guard.load(
        path, str(path), "is damaged, truncated, or not a file of torch.save's; download it again"
    )
    flat = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not flat or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a flat state dict of tensors; convert it first.")
    wrong = [name for name, tensor in state.items() if not _is_plain(tensor)]
    if wrong:
        raise CheckpointError(
            f"{path} holds {', '.join(wrong)} in a form that is not dense floating-point numbers; "
            "convert it first."
        )
    return state


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in _STORAGES and tensor.layout is torch.strided and not tensor.is_meta


class _Storage:
    """Stands for a tensor's bytes in the pickle."""

    def __init__(self, index: int, dtype: torch.dtype, numel: int) -> None:
        if dtype not in _STORAGES:
            raise CheckpointError(f"model.pt cannot hold {dtype}; only floating-point weights.")
        kind = getattr(torch, _STORAGES[dtype])
        self.persistent_id = ("storage", kind, str(index), "cpu", numel)


class _Header:
    """Stands for a tensor in the pickle."""

    def __init__(self, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        strides = torch.empty(shape, device="meta").stride()
        storage = _Storage(index, dtype, torch.Size(shape).numel())
        self.arguments: tuple[Any, ...] = (storage, 0, tuple(shape), strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.persistent_id if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _Header):
            return torch._utils._rebuild_tensor_v2, obj.arguments
        return NotImplemented


class PtWriter:
    """Writes a state dict whose tensors arrive one by one.

    Args:
        path: the file to write.
        tensors: shape and dtype of every tensor by name, in the order in which they will come.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> None:
        self._expected = list(tensors.items())
        self._next = 0
        pickled = io.BytesIO()
        headers = {
            name: _Header(index, shape, dtype)
            for index, (name, (shape, dtype)) in enumerate(self._expected)
        }
        _Pickler(pickled, protocol=2).dump(headers)
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        try:
            self._member("data.pkl", pickled.getbuffer())
            self._member("byteorder", memoryview(b"little"))
        except OSError:
            with contextlib.suppress(OSError):  # of closing what cannot be written
                self.close()
            raise

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor."""
        expected = self._expected[self._next]
        assert (name, (tuple(tensor.shape), tensor.dtype)) == expected, (name, expected)
        self._member(f"data/{self._next}", bytes_of(tensor))
        self._next += 1

    def finish(self) -> None:
        """Completes the file."""
        assert self._next == len(self._expected)
        self._member("version", memoryview(b"3\n"))
        self.close()

    def close(self) -> None:
        """Closes the file; it is unreadable unless ``finish`` was called before."""
        self._zip.close()

    def _member(self, name: str, data: memoryview) -> None:
        info = zipfile.ZipInfo(f"{_ROOT}/{name}")
        assert self._zip.fp is not None
        start = self._zip.fp.tell() + _HEADER_BYTES + len(info.filename) + _ZIP64_BYTES + 4
        padding = -start % _ALIGNMENT
        info.extra = struct.pack("<HH", _PADDING_ID, padding) + b"\0" * padding
        info.file_size = data.nbytes
        with self._zip.open(info, "w", force_zip64=True) as member:
            member.write(data)
