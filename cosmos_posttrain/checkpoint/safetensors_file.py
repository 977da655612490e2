"""safetensors folders: one ``model.safetensors``, or shards with an index.

Flows in: a folder, or tensors one after the other. Flows out: tensors by name, each read on its
own; or ``model.safetensors``, or where that would be too large
``model-00001-of-0000N.safetensors`` ... with ``model.safetensors.index.json``.

A file holds the length of its header (8 bytes), the header (JSON: dtype, shape and place of every
tensor) and the tensors' bytes. The library's own writer needs a whole shard in memory; this one
needs a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint.context import read_json
from cosmos_posttrain.checkpoint.tensor_bytes import bytes_of, num_bytes
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def files(folder: Path) -> list[Path]:
    """The files that hold the tensors, with the index where there is one.

    Raises:
        CheckpointError: the index is damaged, or names a file that is missing.
    """
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again.")
    names = sorted({str(name) for name in weight_map.values()})
    wrong = [n for n in names if Path(n).name != n or not (folder / n).is_file()]
    if wrong:
        raise CheckpointError(f"{folder} lacks {', '.join(wrong)}; download the model again.")
    return [folder / INDEX, *(folder / name for name in names)]


class SafetensorsReader:
    """Tensors of a folder.

    Args:
        folder: with ``model.safetensors``, or an index and its shards.

    Attributes:
        shapes: shape of every tensor by name.
        dtypes: their dtypes.

    Raises:
        CheckpointError: a file is missing, truncated or damaged.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Any] = {}
        by_name = {text: dtype for dtype, text in _DTYPES.items()}
        for path in files(folder):
            if path.name == INDEX:
                continue
            try:
                file = safe_open(path, framework="pt")
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    view = file.get_slice(name)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = by_name[view.get_dtype()]
                    self._files[name] = file
            except (SafetensorError, OSError, KeyError) as error:
                raise CheckpointError(
                    f"{path} is damaged, truncated, or not a file of floating-point weights; "
                    "download it again."
                ) from error

    def read(self, name: str) -> Tensor:
        """One tensor."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


class SafetensorsWriter:
    """Writes shards whose tensors arrive one by one.

    Args:
        folder: an existing folder.
        tensors: shape and dtype of every tensor by name, in the order in which they will come.
        max_shard_bytes: largest shard, unless one tensor alone is larger.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        max_shard_bytes: int,
    ) -> None:
        self._folder = folder
        self._tensors = dict(tensors)
        self._order = list(tensors)
        self._shards = _plan(self._tensors, max_shard_bytes)
        self._next = 0
        self._file: IO[bytes] | None = None

    def _file_name(self, shard: int) -> str:
        if len(self._shards) == 1:
            return SINGLE
        return f"model-{shard + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes the next tensor."""
        expected = self._order[self._next]
        assert (name, (tuple(tensor.shape), tensor.dtype)) == (expected, self._tensors[expected])
        for number, names in enumerate(self._shards):
            if names[0] == name:
                self.close()
                self._file = (self._folder / self._file_name(number)).open("wb")
                self._file.write(self._header(names))
        assert self._file is not None
        self._file.write(bytes_of(tensor))
        self._next += 1

    def _header(self, names: list[str]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in names:
            shape, dtype = self._tensors[name]
            end = start + num_bytes(shape, dtype)
            place = [start, end]
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": place}
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def finish(self) -> None:
        """Closes the last shard and writes the index, where there are several."""
        assert self._next == len(self._order)
        self.close()
        if len(self._shards) == 1:
            return
        weight_map = {
            name: self._file_name(number)
            for number, names in enumerate(self._shards)
            for name in names
        }
        total = sum(num_bytes(*entry) for entry in self._tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self._folder / INDEX, index)

    def close(self) -> None:
        """Closes the shard that is being written."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _plan(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], max_shard_bytes: int
) -> list[list[str]]:
    """Which names go into which shard, in order."""
    shards: list[list[str]] = []
    room = 0
    for name, (shape, dtype) in tensors.items():
        size = num_bytes(shape, dtype)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards
