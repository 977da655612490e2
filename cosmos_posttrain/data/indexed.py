"""Megatron's indexed binary format: the only file of this room that imports megatron.

Flows in: token sequences of clips. Flows out: ``PREFIX.bin`` (tokens) and ``PREFIX.idx`` (lengths
and offsets). One document is one clip.

    .idx   magic, version, dtype code, number of sequences and of documents; then the length of
           each sequence (int32), its offset in the .bin in bytes (int64), where documents end

Megatron writes; reading is done here. Its own reader holds three descriptors and two memory maps
for a shard, and a file that shrinks below a memory map kills the process without a word.
"""

from __future__ import annotations

import contextlib
import os
import struct
import warnings
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.limits import is_too_many_files
from cosmos_posttrain.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # integers, by code
_FLOATS = {7: "<f4"}
_LENGTH, _OFFSET = struct.Struct("<i"), struct.Struct("<q")


def _megatron() -> Any:
    """Megatron's module, imported late (it takes seconds) and without its remarks on import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def token_dtype(vocab_size: int) -> str:
    """The smallest of Megatron's dtypes that holds the vocabulary: ``uint16`` or ``int32``."""
    return np.dtype(_megatron().DType.optimal_dtype(vocab_size)).name


class ShardWriter:
    """Writes documents one after the other; ``finish`` completes both files.

    As a context manager it closes its file if the block fails before that.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: str) -> None:
        self._idx_path = idx_path
        self._builder = _megatron().IndexedDatasetBuilder(str(bin_path), dtype=getattr(np, dtype))

    def add(self, tokens: NDArray[Any]) -> None:
        """Adds one document of one sequence, (length,) in the dtype given."""
        self._builder.add_document(tokens, [tokens.size])

    def finish(self) -> None:
        """Closes both files."""
        self._builder.finalize(str(self._idx_path))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # of the same kind as the error that is on its way
            self._builder.data_file.close()


class ShardReader:
    """Documents of one shard by number; two files are open as long as it lives.

    Nothing of the index is held in memory, and files are read at an offset, so threads and forked
    processes may share a reader.

    Args:
        prefix: path without ``.bin`` and ``.idx``; ``folder/`` reads the original recipe's hidden
            files ``folder/.bin`` and ``folder/.idx``.
        may_be_float: documents are embeddings, which may be float32; tokens never are.

    Attributes:
        bin_bytes: size of the tokens' file.

    Raises:
        DatasetError: a file is missing or damaged.
        OSError: too many files are open.
    """

    def __init__(self, prefix: str | Path, may_be_float: bool = False) -> None:
        self.prefix = str(prefix)
        self._dtypes = _DTYPES | _FLOATS if may_be_float else _DTYPES
        self._idx = _open(self, f"{self.prefix}.idx")
        self._bin = _open(self, f"{self.prefix}.bin")
        self._num_sequences, self._dtype = self._read_header()
        self.bin_bytes = os.fstat(self._bin).st_size
        offset, num_bytes = self._place(self._num_sequences - 1)
        if self.bin_bytes != offset + num_bytes:
            raise DatasetError(
                f"{self.prefix}.bin is damaged: it has {self.bin_bytes} bytes, its index says "
                f"{offset + num_bytes}; prepare the data set again."
            )

    def _read_header(self) -> tuple[int, np.dtype[Any]]:
        """Number of sequences and dtype; refuses an index that contradicts its own size."""
        head = os.pread(self._idx, _HEADER.size, 0)
        if len(head) < _HEADER.size or head[:9] != _MAGIC:
            raise DatasetError(f"{self.prefix}.idx is damaged: it is not an index of Megatron's.")
        _, version, code, num_sequences, num_documents = _HEADER.unpack(head)
        num_bytes = os.fstat(self._idx).st_size
        expected = _HEADER.size + num_sequences * 12 + num_documents * 8
        if version != 1 or code not in self._dtypes or num_bytes < expected or num_sequences < 1:
            raise DatasetError(
                f"{self.prefix}.idx is damaged: version {version}, dtype code {code}, "
                f"{num_sequences} sequences in {num_bytes} bytes; prepare the data set again."
            )
        return num_sequences, np.dtype(self._dtypes[code])

    def _place(self, document: int) -> tuple[int, int]:
        """Offset and size in bytes of a document."""
        position = _HEADER.size + document * _LENGTH.size
        (length,) = _LENGTH.unpack(self._read(self._idx, _LENGTH.size, position, "idx"))
        position = _HEADER.size + self._num_sequences * _LENGTH.size + document * _OFFSET.size
        (offset,) = _OFFSET.unpack(self._read(self._idx, _OFFSET.size, position, "idx"))
        if length < 0 or offset < 0:
            raise DatasetError(
                f"{self.prefix}.idx is damaged: document {document} has {length} tokens from byte "
                f"{offset} on; prepare the data set again."
            )
        return offset, length * self._dtype.itemsize

    def _read(self, descriptor: int, num_bytes: int, offset: int, extension: str) -> bytes:
        parts: list[bytes] = []
        while num_bytes:  # one turn, but for file systems that give less than was asked for
            try:
                part = os.pread(descriptor, num_bytes, offset)
            except OSError as error:
                raise DatasetError(
                    f"{self.prefix}.{extension} cannot be read: {error.strerror}."
                ) from error
            if not part:
                raise DatasetError(
                    f"{self.prefix}.{extension} is damaged: it ends before byte "
                    f"{offset + num_bytes}; prepare the data set again."
                )
            parts.append(part)
            num_bytes, offset = num_bytes - len(part), offset + len(part)
        return b"".join(parts)

    def __len__(self) -> int:
        return self._num_sequences

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, (num_documents,) int32; read anew each time."""
        data = self._read(self._idx, self._num_sequences * 4, _HEADER.size, "idx")
        return np.frombuffer(data, "<i4")

    def __getitem__(self, document: int) -> NDArray[Any]:
        """Tokens of a document, (length,) in the dtype on disk; not to be written to."""
        if not 0 <= document < self._num_sequences:
            raise IndexError(f"document {document} of {self._num_sequences} in {self.prefix}")
        offset, num_bytes = self._place(document)
        return np.frombuffer(self._read(self._bin, num_bytes, offset, "bin"), self._dtype)


def _open(reader: ShardReader, path: str) -> int:
    """Opens a file until the reader is no longer used."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; prepare the data set again.") from error
    except OSError as error:
        if is_too_many_files(error):
            raise  # the pool may close others and try again
        raise DatasetError(f"{path} cannot be opened: {error.strerror}.") from error
    weakref.finalize(reader, os.close, descriptor)
    return descriptor
