"""Turns a NeMo 2 or Megatron checkpoint in the old zarr format into torch_dist.

    python scripts/convert_zarr_checkpoint.py --source path/nemo --target path/nemo_torch_dist

Megatron-Core up to 0.15 wrote zarr, version 0.16 no longer reads it. This script needs neither
Megatron, NeMo nor zarr, only this package and torch, so it runs inside a NeMo container (with
``PYTHONPATH`` set to this repository) as well as outside: Megatron stored its arrays uncompressed,
one file per piece, beside a small JSON description.

Flows in: a folder with ``weights/`` (and ``context/``), or the weights' folder itself. Flows out: a
folder with the model's weights in torch_dist and the same context; optimizer state is left behind.
One layer of one tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint.torch_dist import TorchDistWriter
from cosmos_posttrain.errors import CheckpointError, OutputFolderError, UserError
from cosmos_posttrain.files import replacing
from cosmos_posttrain.launch import run_cli

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "|V2": torch.bfloat16,  # numpy has no name for it
    "<V2": torch.bfloat16,
    "<f2": torch.float16,
    "<f4": torch.float32,
    "<f8": torch.float64,
}
_MODEL = ("embedding.", "decoder.", "output_layer.")
_STACKED = "decoder.layers."


class ZarrArray:
    """An uncompressed zarr v2 array: ``.zarray`` and one file of raw numbers per piece."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            about: dict[str, Any] = json.loads((folder / ".zarray").read_text(encoding="utf-8"))
            self.shape, self.chunks = tuple(about["shape"]), tuple(about["chunks"])
            self._separator = about.get("dimension_separator", ".")
            plain = about["zarr_format"] == 2 and about["order"] == "C"
            plain = plain and about["compressor"] is None and not about.get("filters")
            self.dtype = _DTYPES[about["dtype"]] if plain else None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder}/.zarray is damaged, or of a type that Megatron does not write ({error})."
            ) from error
        if self.dtype is None:
            raise CheckpointError(
                f"{folder} is compressed or not zarr version 2, which Megatron does not write; "
                "load it in the program that wrote it."
            )

    def read(self, layer: int | None = None) -> Tensor:
        """The whole array, or one entry along its first axis."""
        first = [0] * len(self.shape) if layer is None else [layer, *[0] * (len(self.shape) - 1)]
        sizes = list(self.shape) if layer is None else [1, *self.shape[1:]]
        result = torch.empty(sizes, dtype=self.dtype)
        ranges = [
            range(a // c, -(-(a + n) // c))
            for a, n, c in zip(first, sizes, self.chunks, strict=True)
        ]
        for place in itertools.product(*ranges):
            origin = [i * c for i, c in zip(place, self.chunks, strict=True)]
            low = [max(o, a) for o, a in zip(origin, first, strict=True)]
            ends = zip(origin, self.chunks, first, sizes, strict=True)
            high = [min(o + c, a + n) for o, c, a, n in ends]
            result[_region(low, high, first)] = self._piece(place)[_region(low, high, origin)]
        return result if layer is None else result[0]

    def _piece(self, place: tuple[int, ...]) -> Tensor:
        path = self.folder / self._separator.join(map(str, place))
        assert self.dtype is not None
        size = torch.Size(self.chunks).numel() * self.dtype.itemsize
        if not path.is_file() or path.stat().st_size != size:
            raise CheckpointError(f"{path} is missing or truncated; copy the checkpoint again.")
        raw = bytearray(path.read_bytes())
        return torch.frombuffer(raw, dtype=self.dtype).reshape(self.chunks)


def _region(low: list[int], high: list[int], origin: list[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def convert(source: Path, target: Path) -> None:
    """Converts; the target appears when it is complete.

    Raises:
        UserError: no zarr weights there, damaged ones, or a target that is in the way.
    """
    weights = source / "weights" if (source / "weights").is_dir() else source
    names = sorted(path.parent.name for path in weights.glob("*/.zarray"))
    names = [n for n in names if n.removeprefix("module.").startswith(_MODEL)]
    names = [n for n in names if "_extra_state" not in n]
    if not names:
        raise CheckpointError(f"{weights} holds no model in zarr format; check the path.")
    if target.exists():
        raise OutputFolderError(f"{target} exists; name a new folder.")
    try:
        with replacing(target.absolute()) as temporary:
            (temporary / "weights").mkdir(parents=True)
            writer = TorchDistWriter(temporary / "weights")
            for name in names:
                _copy(ZarrArray(weights / name), name, writer)
                print(f"{name} done", flush=True)
            writer.finish()
            if (weights.parent / "context").is_dir():
                shutil.copytree(weights.parent / "context", temporary / "context")
    except OSError as error:
        raise OutputFolderError(
            f"{target} cannot be written ({error.strerror or error}); make room, or name another "
            "folder."
        ) from error
    print(f"wrote {target}: {len(names)} tensors in torch_dist format.")


def _copy(array: ZarrArray, name: str, writer: TorchDistWriter) -> None:
    if not name.removeprefix("module.").startswith(_STACKED):
        writer.add(name, array.read())
        return
    for layer in range(array.shape[0]):
        writer.add(name, array.read(layer), layer, array.shape[0])


def main() -> None:
    """Parses the command line and converts."""
    parser = argparse.ArgumentParser(description="Converts zarr weights to torch_dist.")
    parser.add_argument("--source", required=True, help="folder with weights/ in zarr format")
    parser.add_argument("--target", required=True, help="folder to write")
    given = parser.parse_args()
    if not Path(given.source).is_dir():
        raise UserError(f"{given.source} is not a folder; name the checkpoint's.")
    convert(Path(given.source), Path(given.target))


if __name__ == "__main__":
    run_cli(main)
