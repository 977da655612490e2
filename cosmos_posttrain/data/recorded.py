"""Shards whose files a manifest lists, each compared with it as far as that is cheap.

Flows in: a folder and the manifest's table of shards. Flows out: documents by number. Opening looks
whether all files are there; each shard is compared when it is first used:

    size of every file        on opening, up to 1,000 shards; else on first use
    sha256 of .idx, .jsonl    on first use
    sha256 of .bin            on first use, where all .bin files together have at most 1 GiB
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from cosmos_posttrain.data.indexed import ShardReader
from cosmos_posttrain.data.limits import naming_limits
from cosmos_posttrain.data.shard_table import ShardTable
from cosmos_posttrain.data.shards import OpenShards
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import sha256_of_file

MAX_SHARDS_SIZED_ON_OPENING = 1000
MAX_HASHED_BIN_BYTES = 1 << 30


class RecordedShards(OpenShards):
    """The shards of a table.

    Args:
        folder: where their files are.
        table: of the manifest.

    Raises:
        DatasetError: a file is missing or damaged.
    """

    def __init__(self, folder: Path, table: ShardTable) -> None:
        self.folder = folder
        self.table = table
        super().__init__(table.num_documents)
        self._hashes_bin = "bin" in table.files and (
            np.maximum(table.files["bin"].num_bytes, 0).sum() <= MAX_HASHED_BIN_BYTES
        )
        self._check_presence()

    def prefix(self, shard: int) -> str:
        return str(self.folder / self.table.name(shard))

    def path(self, shard: int, extension: str) -> Path:
        """One of a shard's files."""
        return self.folder / f"{self.table.name(shard)}.{extension}"

    def _check_presence(self) -> None:
        present = set(os.listdir(self.folder))
        table = self.table
        names = [name.decode() for name in table.names.tolist()]
        for extension, column in table.files.items():
            for shard in np.flatnonzero(column.num_bytes >= 0).tolist():
                if f"{names[shard]}.{extension}" not in present:
                    path = self.path(shard, extension)
                    raise DatasetError(f"{path} is missing; prepare the data set again.")
                if len(table) <= MAX_SHARDS_SIZED_ON_OPENING:
                    self._check_size(shard, extension, self.path(shard, extension).stat().st_size)

    def _check_size(self, shard: int, extension: str, num_bytes: int) -> None:
        recorded = int(self.table.files[extension].num_bytes[shard])
        if num_bytes != recorded:
            raise DatasetError(
                f"{self.path(shard, extension)} is damaged: it has {num_bytes} bytes, the manifest "
                f"says {recorded}; prepare the data set again."
            )

    def _check_hash(self, shard: int, extension: str, found: str) -> None:
        if found != self.table.files[extension].hash_of(shard):
            raise DatasetError(
                f"{self.path(shard, extension)} is damaged: its sha256 is not the manifest's; "
                "prepare the data set again."
            )

    def _check(self, shard: int, reader: ShardReader) -> None:
        self._check_size(shard, "bin", reader.bin_bytes)
        for extension in ("idx", "bin") if self._hashes_bin else ("idx",):
            path = self.path(shard, extension)
            with naming_limits(str(path)):
                self._check_hash(shard, extension, sha256_of_file(path))

    def read(self, shard: int, extension: str) -> bytes:
        """All of one of a shard's files, as the manifest has it.

        Raises:
            DatasetError: it is missing or damaged.
        """
        path = self.path(shard, extension)
        try:
            with naming_limits(str(path)):
                data = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error
        self._check_size(shard, extension, len(data))
        self._check_hash(shard, extension, hashlib.sha256(data).hexdigest())
        return data

    def _read_sidecar(self, shard: int) -> tuple[Path, bytes, int]:
        data = self.read(shard, "jsonl")
        return self.path(shard, "jsonl"), data, int(self.table.num_documents[shard])
