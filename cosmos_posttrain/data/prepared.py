"""A folder that this program prepared: shards, their sidecars and the manifest's hashes of both.

Flows in: a folder with a manifest. Flows out: its shards. Opening looks whether all files are
there; each shard is compared with the manifest when it is first used, as far as that is cheap:

    size of every file        on opening, up to 1,000 shards; else on first use
    sha256 of .idx, .jsonl    on first use
    sha256 of .bin            on first use, where all .bin files together have at most 1 GiB

``python -m cosmos_posttrain.data verify`` compares everything.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_posttrain.data.indexed import ShardReader
from cosmos_posttrain.data.layout import EXTENSIONS, MANIFEST_FILE
from cosmos_posttrain.data.limits import naming_limits
from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.data.serial import from_plain
from cosmos_posttrain.data.shards import ShardSet
from cosmos_posttrain.data.source_runs import SourceRuns, load_runs, parse_rows, runs_of_sidecars
from cosmos_posttrain.data.threads import mapped
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import sha256_of_file

MAX_SHARDS_SIZED_ON_OPENING = 1000
MAX_HASHED_BIN_BYTES = 1 << 30


class PreparedShards(ShardSet):
    """The shards of a prepared folder.

    Raises:
        DatasetError: the manifest or a shard is missing, damaged or incomplete.
    """

    manifest: Manifest

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.load(folder)
        self.fingerprint = self.manifest.fingerprint
        self.seq_length = self.manifest.contract.seq_length
        table = self.manifest.shards
        super().__init__(table.num_documents)
        self._hashes_bin = "bin" in table.files and (
            np.maximum(table.files["bin"].num_bytes, 0).sum() <= MAX_HASHED_BIN_BYTES
        )
        self._rows: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._check_table()
        self._check_presence()

    def prefix(self, shard: int) -> str:
        return str(self.folder / self.manifest.shards.name(shard))

    def path(self, shard: int, extension: str) -> Path:
        """One of a shard's files."""
        return self.folder / f"{self.manifest.shards.name(shard)}.{extension}"

    def _check_table(self) -> None:
        """Refuses a manifest whose files do not go with its documents."""
        table = self.manifest.shards
        absent = np.full(len(table), -1)
        sizes = {e: table.files[e].num_bytes if e in table.files else absent for e in EXTENSIONS}
        token_bytes = np.dtype(self.manifest.contract.dtype).itemsize * self.seq_length
        fits = (table.num_documents == 0) | (sizes["bin"] == table.num_documents * token_bytes)
        for column in sizes.values():
            fits &= (column >= 0) == (table.num_documents > 0)
        if not fits.all():
            raise DatasetError(
                f"{self.folder / MANIFEST_FILE} is damaged: the files of "
                f"{table.name(int(np.argmin(fits)))} do not go with its documents; prepare the "
                "data set again."
            )

    def _check_presence(self) -> None:
        present = set(os.listdir(self.folder))
        table = self.manifest.shards
        names = [name.decode() for name in table.names.tolist()]
        for extension, column in table.files.items():
            for shard in np.flatnonzero(column.num_bytes >= 0).tolist():
                if f"{names[shard]}.{extension}" not in present:
                    path = self.path(shard, extension)
                    raise DatasetError(f"{path} is missing; prepare the data set again.")
                if len(table) <= MAX_SHARDS_SIZED_ON_OPENING:
                    self._check_size(shard, extension, self.path(shard, extension).stat().st_size)

    def _check_size(self, shard: int, extension: str, num_bytes: int) -> None:
        recorded = int(self.manifest.shards.files[extension].num_bytes[shard])
        if num_bytes != recorded:
            raise DatasetError(
                f"{self.path(shard, extension)} is damaged: it has {num_bytes} bytes, the manifest "
                f"says {recorded}; prepare the data set again."
            )

    def _check_hash(self, shard: int, extension: str, found: str) -> None:
        if found != self.manifest.shards.files[extension].hash_of(shard):
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
        recorded = int(self.manifest.shards.num_documents[shard])
        if len(reader) != recorded or (reader.lengths != self.seq_length).any():
            raise DatasetError(
                f"{reader.prefix} is damaged: its index does not have {recorded} documents of "
                f"{self.seq_length} tokens; prepare the data set again."
            )

    def _read_sidecar(self, shard: int) -> tuple[Path, bytes, int]:
        path = self.path(shard, "jsonl")
        try:
            with naming_limits(str(path)):
                data = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error
        self._check_size(shard, "jsonl", len(data))
        self._check_hash(shard, "jsonl", hashlib.sha256(data).hexdigest())
        return path, data, int(self.manifest.shards.num_documents[shard])

    def row(self, document: int) -> DocumentRow:
        shard, number = self.locate(document)
        held, rows = self._rows
        if held != shard:
            path, data, num_documents = self._read_sidecar(shard)
            rows = parse_rows(data, path, num_documents)
            self._rows = shard, rows
        return from_plain(DocumentRow, rows[number], str(self.path(shard, "jsonl")))

    def source_runs(self) -> SourceRuns:
        runs = load_runs(self.folder, self.fingerprint, len(self))
        if runs is None:
            counts = self.manifest.shards.num_documents
            runs = runs_of_sidecars(mapped(self._read_sidecar, np.flatnonzero(counts).tolist()))
        return runs
