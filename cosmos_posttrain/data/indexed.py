"""Megatron's indexed binary format: the only file of this room that imports megatron.

Flows in: token sequences of clips. Flows out: ``PREFIX.bin`` (tokens) and ``PREFIX.idx`` (lengths
and offsets), read back by memory mapping. One document is one clip.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents
_ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # integer dtype codes


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
    """Writes documents one after the other; ``finish`` completes both files."""

    def __init__(self, bin_path: Path, idx_path: Path, dtype: str) -> None:
        self._idx_path = idx_path
        self._builder = _megatron().IndexedDatasetBuilder(str(bin_path), dtype=getattr(np, dtype))

    def add(self, tokens: NDArray[Any]) -> None:
        """Adds one document of one sequence, (seq_length,) integers."""
        self._builder.add_document(tokens, [tokens.size])

    def finish(self) -> None:
        """Closes both files."""
        self._builder.finalize(str(self._idx_path))


def _check_files(prefix: str) -> None:
    """Refuses an index that contradicts its own size; Megatron would crash or read garbage."""
    idx_path, bin_path = Path(prefix + ".idx"), Path(prefix + ".bin")
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DatasetError(f"{path} is missing; prepare the data set again.")
    num_bytes = idx_path.stat().st_size
    with idx_path.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or head[:9] != _MAGIC:
        raise DatasetError(f"{idx_path} is damaged: it is not an index of Megatron's.")
    _, version, code, num_sequences, num_documents = _HEADER.unpack(head)
    expected = _HEADER.size + num_sequences * 12 + num_documents * 8
    if version != 1 or code not in _ITEM_BYTES or num_bytes < expected or num_sequences < 1:
        raise DatasetError(
            f"{idx_path} is damaged: version {version}, dtype code {code}, {num_sequences} "
            f"sequences in {num_bytes} bytes; prepare the data set again."
        )


class ShardReader:
    """Documents of one shard by number, read through a memory map; can be pickled.

    Args:
        prefix: path without ``.bin`` and ``.idx``; ``folder/`` reads the original recipe's hidden
            files ``folder/.bin`` and ``folder/.idx``.

    Raises:
        DatasetError: a file is missing or damaged.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        _check_files(self.prefix)
        try:
            self._data = _megatron().IndexedDataset(self.prefix, mmap=True)
        except (AssertionError, ValueError, OSError) as error:
            raise DatasetError(f"{self.prefix}.idx is damaged: {error}.") from error
        lengths = self.lengths
        item_bytes = np.dtype(self._data.index.dtype).itemsize
        end = int(self._data.index.sequence_pointers[-1]) + int(lengths[-1]) * item_bytes
        num_bytes = Path(self.prefix + ".bin").stat().st_size
        if num_bytes != end:
            raise DatasetError(
                f"{self.prefix}.bin is damaged: it has {num_bytes} bytes, its index says {end}; "
                "prepare the data set again."
            )

    def __len__(self) -> int:
        return len(self._data)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each document, (num_documents,) int32."""
        return np.array(self._data.sequence_lengths)

    def __getitem__(self, document: int) -> NDArray[Any]:
        """Tokens of a document, (length,) in the dtype on disk."""
        # A copy: Megatron closes its memory map with the reader, whoever still looks at it.
        return np.array(self._data[int(document)])
