"""torch_dist folders (Megatron's distributed checkpoints) read and written a piece at a time.

Flows in: a folder that any layout wrote. Flows out: one tensor, one layer of a stacked tensor, or
any boxes of a tensor, with memory for one piece. And the other way round: tensors, layers or boxes
one after the other become a folder that Megatron loads at any layout. No process group and no model
is needed; where several ranks write, each writes files of its own, and one writes the index.

A folder holds ``.metadata`` (the index: shape, dtype and pieces of every key, and the file and
offset of every piece), ``*.distcp`` (the pieces, each in ``torch.save``'s format), ``common.pt``
and ``metadata.json``.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint import guard
from cosmos_posttrain.checkpoint.reading import FileWindow
from cosmos_posttrain.errors import CheckpointError, UnreadableCheckpointError
from cosmos_posttrain.files import sync, write_json

# NeMo wraps its models once, so all its keys start with this.
PREFIX = "module."
# In front of the key of the weight that it belongs to, as in Megatron's own checkpoints: optimizer
# state, such as the weights' average over the steps.
STATE = "optimizer.state."
AVERAGE = "ema"
# A new file is begun after this many bytes, so that no single file becomes unwieldy.
MAX_FILE_BYTES = 5 * 10**9
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def is_torch_dist(folder: Path) -> bool:
    """True where the folder holds a complete torch_dist checkpoint."""
    return (folder / guard.METADATA_FILE).is_file() and any(folder.glob("*.distcp"))


# Where a box begins in a tensor on disk, and the numbers in it.
Box = tuple[Sequence[int], Tensor]


class TorchDistReader:
    """Tensors of a torch_dist folder.

    Args:
        folder: the folder with the index.
        verify: compare every piece that is read with the checksum that was stored with it, which
            torch does not.

    Attributes:
        shapes: shape of every tensor by its key; other objects are left out.
        dtypes: their dtypes.
        objects: keys of the other objects, which are pickles.

    Raises:
        CheckpointError: the index is missing, damaged, or holds code.
    """

    def __init__(self, folder: Path, verify: bool = False) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder = folder
        self._verify = verify
        metadata = guard.read_metadata(folder)
        tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {key: tuple(entry.size) for key, entry in tensors.items()}
        self.dtypes: dict[str, torch.dtype] = {
            key: entry.properties.dtype for key, entry in tensors.items()
        }
        self.objects = metadata.state_dict_metadata.keys() - tensors.keys()
        self._chunks = {key: entry.chunks for key, entry in tensors.items()}
        self._places = {
            (index.fqn, tuple(index.offset)): place
            for index, place in metadata.storage_data.items()
            if index.offset is not None
        }

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """One whole tensor, or one entry along its first axis.

        Raises:
            CheckpointError: a piece is missing or damaged.
            UnreadableCheckpointError: its file is missing, or cannot be read.
        """
        shape = self.shapes[key]
        first = [0] * len(shape) if layer is None else [layer, *[0] * (len(shape) - 1)]
        sizes = list(shape) if layer is None else [1, *shape[1:]]
        same = [c for c in self._chunks[key] if (list(c.offsets), list(c.sizes)) == (first, sizes)]
        if same:
            result = self._read_piece(key, same[0])
        else:
            result = torch.empty(sizes, dtype=self.dtypes[key])
            self.read_into(key, [(first, result)])
        return result if layer is None else result[0]

    def read_into(self, key: str, boxes: Iterable[Box]) -> None:
        """Fills boxes of one tensor in place; every stored piece is read once, if at all.

        Args:
            key: the tensor.
            boxes: where each begins in the tensor, and the memory to fill, of any dtype and device.

        Raises:
            CheckpointError: a piece is missing or damaged.
            UnreadableCheckpointError: its file is missing, or cannot be read.
        """
        boxes = list(boxes)
        missing = sum(memory.numel() for _, memory in boxes)
        for chunk in self._chunks[key]:
            piece = None
            for offsets, memory in boxes:
                low = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
                ends = zip(offsets, memory.shape, chunk.offsets, chunk.sizes, strict=True)
                high = [min(a + n, b + m) for a, n, b, m in ends]
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                if piece is None:
                    piece = self._read_piece(key, chunk)
                part = piece[_region(low, high, chunk.offsets)]
                memory[_region(low, high, offsets)].copy_(part)
                missing -= part.numel()
        if missing:
            raise CheckpointError(f"{self.folder} lacks parts of {key}; restore the checkpoint.")

    def _read_piece(self, key: str, chunk: Any) -> Tensor:
        place = self._places.get((key, tuple(chunk.offsets)))
        if place is None or getattr(place, "transform_descriptors", None):
            raise CheckpointError(
                f"{self.folder} holds {key} in a form that is not torch_dist's own (missing or "
                "compressed pieces); restore the checkpoint."
            )
        path = self.folder / place.relative_path
        try:
            with path.open("rb") as file:
                window = FileWindow(file, place.offset, place.length)
                where = f"{self.folder} ({key})"
                piece = guard.load(window, where, "is damaged; restore the checkpoint")
                is_sound = not self._verify or _has_stored_checksum(window, piece)
                if window.problem is not None:
                    raise window.problem
        except FileNotFoundError as error:
            raise UnreadableCheckpointError(
                f"{self.folder} lacks {place.relative_path}; restore the checkpoint."
            ) from error
        except (OSError, MemoryError) as error:
            raise guard.unreadable(str(path), error) from error
        if (
            not is_sound
            or not isinstance(piece, Tensor)
            or piece.dtype != self.dtypes[key]
            or piece.numel() != chunk.sizes.numel()
        ):
            raise CheckpointError(
                f"{self.folder} holds something else as {key} than was written; restore the "
                "checkpoint."
            )
        return piece.reshape(tuple(chunk.sizes))


def _has_stored_checksum(file: FileWindow, piece: Any) -> bool:
    """Whether a loaded tensor's bytes are those that ``torch.save`` wrote, by the file's CRC-32."""
    file.seek(0)
    try:
        members = zipfile.ZipFile(file).infolist()
    except MemoryError:
        raise
    except Exception:  # a damaged directory raises whatever its bytes happen to mean
        return False
    stored = [member for member in members if member.filename.endswith("/data/0")]
    if not (isinstance(piece, Tensor) and len(stored) == 1):
        return False
    numbers = torch.empty(0, dtype=torch.uint8).set_(piece.untyped_storage())
    buffer: Any = numbers.numpy()  # a buffer, which numpy's types do not say
    return zlib.crc32(buffer) == stored[0].CRC


def _region(low: Sequence[int], high: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


@dataclass
class Index:
    """What one writer has written: torch's tables of tensors and of the pieces' places."""

    tensors: dict[str, Any] = field(default_factory=dict)
    places: dict[Any, Any] = field(default_factory=dict)


class TorchDistWriter:
    """Writes a torch_dist folder one tensor, one layer or one box after the other.

    Args:
        folder: an existing empty folder. It is readable only after ``finish`` (or, where several
            ranks write, after ``write_index``).
        rank: of this writer among those that write the folder; goes into its file names.

    Attributes:
        index: what was written so far.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.index = Index()
        self._folder, self._rank = folder, rank
        self._num_files, self._name = 0, ""
        self._file: IO[bytes] | None = None

    def add(self, key: str, tensor: Tensor, layer: int | None = None, num_layers: int = 0) -> None:
        """Writes a whole tensor, or layer ``layer`` of ``num_layers`` of a stacked one."""
        if layer is None:
            self.add_box(key, tensor.shape, ([0] * tensor.dim(), tensor))
        else:
            box = ([layer, *[0] * tensor.dim()], tensor.unsqueeze(0))
            self.add_box(key, (num_layers, *tensor.shape), box)

    def add_box(self, key: str, shape: Sequence[int], box: Box) -> None:
        """Writes a box of the tensor ``key``, whose whole shape is ``shape``."""
        from torch.distributed.checkpoint import filesystem, metadata

        piece = own_storage(box[1])
        offsets = torch.Size(box[0])
        entry = self.index.tensors.get(key)
        if entry is None:
            properties = metadata.TensorProperties(dtype=piece.dtype)
            entry = metadata.TensorStorageMetadata(properties, torch.Size(shape), [])
            self.index.tensors[key] = entry
        assert entry.size == torch.Size(shape) and entry.properties.dtype == piece.dtype, key
        entry.chunks.append(metadata.ChunkStorageMetadata(offsets, piece.shape))
        file, name = self._open()
        start = file.tell()
        _save(piece, file)
        place = filesystem._StorageInfo(name, start, file.tell() - start)
        self.index.places[metadata.MetadataIndex(key, offsets)] = place

    def _open(self) -> tuple[IO[bytes], str]:
        if self._file is not None and self._file.tell() > MAX_FILE_BYTES:
            self.close()
        if self._file is None:
            self._name = f"__{self._rank}_{self._num_files}.distcp"
            self._file = (self._folder / self._name).open("wb")
            self._num_files += 1
        return self._file, self._name

    def finish(self, common: dict[str, Any] | None = None) -> None:
        """Writes the index of a folder that this writer alone wrote; it is complete after this.

        Args:
            common: see ``write_index``.
        """
        self.close()
        write_index(self._folder, [self.index], common)

    def close(self) -> None:
        """Forces the file that is being written to disk and closes it."""
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            finally:
                self._file.close()
                self._file = None


def write_index(
    folder: Path, indexes: Iterable[Index], common: dict[str, Any] | None = None
) -> None:
    """Completes a folder: one index of what all writers wrote, and what Megatron keeps beside it.

    Args:
        folder: where the writers' files are.
        indexes: of all writers, closed.
        common: plain values that belong to no tensor.
    """
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    whole = Index()
    for index in indexes:
        whole.places |= index.places
        for key, entry in index.tensors.items():
            known = whole.tensors.setdefault(key, dataclasses.replace(entry, chunks=[]))
            assert (known.size, known.properties) == (entry.size, entry.properties), key
            known.chunks.extend(entry.chunks)
    for key, entry in whole.tensors.items():
        assert sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel(), key
    _save(common or {}, folder / guard.COMMON_FILE)
    metadata = Metadata(whole.tensors, storage_data=whole.places, storage_meta=StorageMeta())
    with (folder / guard.METADATA_FILE).open("wb") as file:
        pickle.dump(metadata, file)
    write_json(folder / "metadata.json", BACKEND)
    for name in (guard.COMMON_FILE, guard.METADATA_FILE):
        sync(folder / name)


def _save(value: Any, file: Any) -> None:
    """``torch.save``, where a full disk is an OSError as everywhere else.

    Raises:
        OSError: it cannot be written.
    """
    try:
        torch.save(value, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise OSError(cause.errno, cause.strerror) from error
        if isinstance(file, Path):  # written by torch's own code, which knows no OSError
            raise OSError(errno.EIO, f"{file.name} was not written whole") from error
        raise


def own_storage(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous and without the storage of a larger one behind it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
