"""The shards of a manifest, as a table of numbers: about 150 bytes for each of them. No torch.

Flows in: the manifest's list of shards, or ``ShardInfo`` of shards just written. Flows out: a
sequence of ``ShardInfo`` that is held as arrays, and the manifest's text of it. 156,250 shards (ten
million clips) as objects would be a quarter of a gigabyte in each process.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from cosmos_posttrain.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHA256_BYTES = 32


@dataclass(frozen=True)
class ShardInfo:
    """One shard: files by their extension, each with its size and hash.

    A shard of which no video could be read has no files.
    """

    name: str
    num_documents: int
    num_sources: int
    files: dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class FileColumn:
    """The files of one extension, over all shards.

    Attributes:
        num_bytes: (num_shards,) int64; -1 where the shard has no such file.
        sha256: (num_shards, 32) uint8.
    """

    num_bytes: NDArray[np.int64]
    sha256: NDArray[np.uint8]

    def hash_of(self, shard: int) -> str:
        """The recorded hash of a shard's file, in hexadecimal."""
        return self.sha256[shard].tobytes().hex()


class ShardTable(Sequence[ShardInfo]):
    """All shards, in order.

    Attributes:
        names: (num_shards,) bytes, without extension.
        num_documents: (num_shards,) int64.
        num_sources: (num_shards,) int64; a source that lies in two shards counts in both.
        files: by extension.
    """

    def __init__(self, shards: Iterable[ShardInfo] = ()) -> None:
        names: list[bytes] = []
        counts, sources = array("q"), array("q")
        columns: dict[str, tuple[array[int], bytearray]] = {}
        for number, shard in enumerate(shards):
            names.append(shard.name.encode())
            counts.append(shard.num_documents)
            sources.append(shard.num_sources)
            for extension in shard.files.keys() - columns.keys():
                sizes = array("q", [-1]) * number
                columns[extension] = sizes, bytearray(number * _SHA256_BYTES)
            for extension, (sizes, hashes) in columns.items():
                entry = shard.files.get(extension)
                sizes.append(-1 if entry is None else entry["num_bytes"])
                hashes += bytes(_SHA256_BYTES) if entry is None else bytes.fromhex(entry["sha256"])
        self.names = np.array(names, dtype=np.bytes_)
        self.num_documents = np.array(counts, np.int64)
        self.num_sources = np.array(sources, np.int64)
        self.files = {
            extension: FileColumn(
                np.array(sizes, np.int64),
                np.frombuffer(bytes(hashes), np.uint8).reshape(-1, _SHA256_BYTES),
            )
            for extension, (sizes, hashes) in sorted(columns.items())
        }

    @classmethod
    def read(cls, value: Any, where: str) -> ShardTable:
        """The table of a manifest's list.

        Raises:
            DatasetError: names ``where`` and the shard that does not fit.
        """
        if not isinstance(value, list):
            raise DatasetError(f"{where} is damaged: it has no list of shards.")
        return cls(_read_shard(item, where, number) for number, item in enumerate(value))

    def name(self, shard: int) -> str:
        """The shard's file name without extension."""
        return bytes(self.names[shard]).decode()

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[ShardInfo]: ...

    def __getitem__(self, index: int | slice) -> ShardInfo | Sequence[ShardInfo]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        files = {
            extension: {
                "sha256": column.hash_of(number),
                "num_bytes": int(column.num_bytes[number]),
            }
            for extension, column in self.files.items()
            if column.num_bytes[number] >= 0
        }
        counts = int(self.num_documents[number]), int(self.num_sources[number])
        return ShardInfo(self.name(number), *counts, files)

    def __iter__(self) -> Iterator[ShardInfo]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable) or self.files.keys() != other.files.keys():
            return False
        return (
            np.array_equal(self.names, other.names)
            and np.array_equal(self.num_documents, other.num_documents)
            and np.array_equal(self.num_sources, other.num_sources)
            and all(
                np.array_equal(column.num_bytes, other.files[extension].num_bytes)
                and np.array_equal(column.sha256, other.files[extension].sha256)
                for extension, column in self.files.items()
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def json_blocks(self) -> Iterator[str]:
        """Each shard as ``json.dumps(..., indent=2)`` writes it in a list, many times faster."""
        for shard in self:
            files = ",\n".join(
                f'        {json.dumps(extension)}: {{\n          "sha256": "{entry["sha256"]}",\n'
                f'          "num_bytes": {entry["num_bytes"]}\n        }}'
                for extension, entry in shard.files.items()
            )
            files = f"{{\n{files}\n      }}" if files else "{}"
            yield (
                f'    {{\n      "name": {json.dumps(shard.name, ensure_ascii=False)},\n'
                f'      "num_documents": {shard.num_documents},\n'
                f'      "num_sources": {shard.num_sources},\n      "files": {files}\n    }}'
            )

    def update_hash(self, digest: hashlib._Hash) -> None:
        """Adds the list of every shard's hashes, by extension, as canonical JSON."""
        comma = b""
        for number in range(len(self)):
            hashes = ",".join(
                f'"{extension}":"{column.hash_of(number)}"'
                for extension, column in self.files.items()
                if column.num_bytes[number] >= 0
            )
            digest.update(comma + f"{{{hashes}}}".encode())
            comma = b","


def _read_shard(value: Any, where: str, number: int) -> ShardInfo:
    try:
        shard = ShardInfo(
            value["name"], value["num_documents"], value["num_sources"], value["files"]
        )
        entries = shard.files.values()
        fits = (
            type(shard.name) is str
            and type(shard.num_documents) is type(shard.num_sources) is int
            and shard.num_documents >= 0
            and all(type(entry["num_bytes"]) is int for entry in entries)
            and all(len(bytes.fromhex(entry["sha256"])) == _SHA256_BYTES for entry in entries)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise DatasetError(f"{where} is damaged: its entry of shard {number} does not fit.")
    return shard
