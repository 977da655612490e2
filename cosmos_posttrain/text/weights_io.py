"""Reading and writing the tensors of T5 encoders.

Flows in: a folder with safetensors or PyTorch files, whole or in parts, of an encoder alone or of a
whole T5. Flows out: the encoder's tensors one by one, with the hash that identifies it; or such a
folder, of the encoder alone.

A tensor is read when it is needed, hashed, cast and moved by one of a few threads, so that an
encoder of 11 billion parameters passes through with little memory beside its final place.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain.errors import TextError
from cosmos_posttrain.files import read_json, replacing, write_json

# In order of preference; transformers' own names.
SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json")
PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

EMBEDDING = "shared.weight"
_TIED_EMBEDDING = "encoder.embed_tokens.weight"

# Others are quantised, which takes more than the tensor to undo.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_THREADS = 4
_MAX_PART_BYTES = 2 * 1024**3

Reader = Callable[[], Tensor]


# Reading.


def canonical(name: str) -> str | None:
    """The one name of an encoder's tensor; None for those of a decoder."""
    if name == _TIED_EMBEDDING:
        return EMBEDDING
    return name if name == EMBEDDING or name.startswith("encoder.") else None


def has_weights(folder: Path, names: Iterable[str] = SAFETENSORS_FILES + PICKLE_FILES) -> bool:
    """Whether one of the files is there."""
    return any((folder / name).is_file() for name in names)


def open_tensors(folder: Path) -> dict[str, Reader]:
    """A reader for each tensor of the encoder in a folder, by canonical name.

    Raises:
        TextError: there are no weights, or they are damaged.
    """
    path = next(
        (folder / n for n in SAFETENSORS_FILES + PICKLE_FILES if (folder / n).is_file()), None
    )
    if path is None:
        raise TextError(
            f"{folder} holds no encoder weights; put {SAFETENSORS_FILES[0]} (or {PICKLE_FILES[0]}) "
            "there, or give another folder."
        )
    files = _parts(path) if path.suffix == ".json" else [path]
    readers: dict[str, Reader] = {}
    for file in files:
        opened = _open_safetensors(file) if file.suffix == ".safetensors" else _open_pickle(file)
        # The embedding comes under two names, which are one tensor.
        for name, reader in sorted(opened.items()):
            if key := canonical(name):
                readers[key] = reader
    if not readers:
        raise TextError(f"{path} holds no T5 encoder: no tensor's name begins with 'encoder.'.")
    return readers


def _parts(index: Path) -> list[Path]:
    """The files that an index names and that hold something of the encoder."""
    value = read_json(index, TextError, "copy or download it again").get("weight_map")
    names = set()
    for tensor, name in value.items() if isinstance(value, dict) else ():
        if canonical(tensor):
            names.add(str(name))
    if not names or any(Path(name).name != name for name in names):
        raise TextError(f"{index} is damaged: it names no files of an encoder in its folder.")
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise TextError(
            f"{index.parent / missing[0]} is missing (and {len(missing) - 1} more); copy or "
            "download it again."
        )
    return [index.parent / name for name in sorted(names)]


def _open_safetensors(path: Path) -> dict[str, Reader]:
    from safetensors import SafetensorError, safe_open

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    try:
        with safe_open(path, framework="pt") as file:
            return {name: partial(read, name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise TextError(
            f"{path} is not a readable safetensors file ({error}); copy or download it again."
        ) from error


def _open_pickle(path: Path) -> dict[str, Reader]:
    """Never runs code of the file. Files of PyTorch 1.6 and later are mapped, older ones read."""
    try:
        tensors: Any = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except UnpicklingError as error:
        raise TextError(
            f"{path} is no plain file of weights, or damaged; only tensors are read from it, so "
            "convert it to model.safetensors where you trust it."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise TextError(
            f"{path} is not readable ({first_line}); copy or download it again."
        ) from error
    if not isinstance(tensors, dict):
        raise TextError(f"{path} holds a {type(tensors).__name__}, not a model's tensors by name.")
    return {
        str(name): partial(lambda tensor: tensor, value)
        for name, value in tensors.items()
        if isinstance(value, Tensor)
    }


def check_names(
    readers: Mapping[str, Reader], shapes: Mapping[str, Sequence[int]], folder: Path
) -> None:
    """Refuses tensors that are missing or too many.

    Raises:
        TextError: names the first.
    """
    missing = sorted(shapes.keys() - readers.keys())
    extra = sorted(readers.keys() - shapes.keys())
    for names, what in ((missing, "lack"), (extra, "have the extra")):
        if names:
            raise TextError(
                f"the weights in {folder} {what} tensor {names[0]} (and {len(names) - 1} more): "
                "they are not those of the T5 encoder that its config.json describes."
            )


@dataclass(frozen=True)
class Weights:
    """An encoder's tensors, or some of them.

    Attributes:
        tensors: by canonical name.
        digests: of each tensor, see ``encoder_sha256``.
    """

    tensors: dict[str, Tensor]
    digests: dict[str, str]


def read_weights(
    readers: Mapping[str, Reader],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    folder: Path,
) -> Weights:
    """Reads the tensors of ``shapes``.

    Raises:
        TextError: one has another shape, is not of floats, or is not finite.
    """

    def read(name: str) -> tuple[Tensor, str]:
        tensor = readers[name]()
        what = None
        if tensor.dtype not in _DTYPES:
            what = (
                f"is {str(tensor.dtype).removeprefix('torch.')}; convert it to float32 or bfloat16"
            )
        elif tuple(tensor.shape) != tuple(shapes[name]):
            what = (
                f"has shape {list(tensor.shape)}, not {list(shapes[name])} as its config.json says"
            )
        rounded = tensor.detach().to(torch.bfloat16).contiguous()
        if what is None and not rounded.isfinite().all():
            what = "has values that are infinite or not a number: the file is damaged"
        if what is not None:
            raise TextError(f"the tensor {name} in {folder} {what}.")
        digest = hashlib.sha256(rounded.view(torch.uint8).numpy().data).hexdigest()
        moved = tensor.to(device, dtype)
        # A copy, so that no tensor holds on to the whole file that it was mapped from.
        return (moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved), digest

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        found = dict(zip(shapes, pool.map(read, shapes), strict=True))
    return Weights(
        {name: tensor for name, (tensor, _) in found.items()},
        {name: f"{list(shapes[name])} {digest}" for name, (_, digest) in found.items()},
    )


def encoder_sha256(digests: Mapping[str, str]) -> str:
    """Identifies an encoder by its tensors: names, shapes, and values rounded to bfloat16.

    Whole or in parts, safetensors or PyTorch's files, with or without the decoder, in float32 or
    converted to bfloat16, the same encoder has the same hash.
    """
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


# Writing.


def plan_parts(
    shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, max_bytes: int = _MAX_PART_BYTES
) -> dict[str, list[str]]:
    """Which file holds which tensors: one, or several of at most ``max_bytes`` (or one tensor)."""
    parts: list[list[str]] = [[]]
    num_bytes = 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if parts[-1] and num_bytes + size > max_bytes:
            parts.append([])
            num_bytes = 0
        parts[-1].append(name)
        num_bytes += size
    if len(parts) == 1:
        return {SAFETENSORS_FILES[0]: parts[0]}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": part
        for number, part in enumerate(parts, 1)
    }


def write_part(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one safetensors file atomically."""
    from safetensors.torch import save

    with replacing(path) as temporary:  # save_file would make it unreadable for other users
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))


def write_index(folder: Path, parts: Mapping[str, Sequence[str]], num_bytes: int) -> None:
    """Writes the index that several parts need; nothing for one."""
    if len(parts) > 1:
        weight_map = {name: file for file, names in parts.items() for name in names}
        value = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        write_json(folder / SAFETENSORS_FILES[1], value)
