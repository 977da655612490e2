"""Indexed data that was not prepared by this program, such as the original recipe's.

Flows in: a folder or a path prefix. Flows out: its shards. There is no manifest, so each document
is its own source, and what the index says is all that is known.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cosmos_posttrain.data.indexed import ShardReader
from cosmos_posttrain.data.limits import naming_limits
from cosmos_posttrain.data.manifest import DocumentRow
from cosmos_posttrain.data.shards import ShardSet
from cosmos_posttrain.data.source_runs import SourceRuns
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import sha256_of_file, sha256_of_json


class ForeignShards(ShardSet):
    """Pairs of .bin and .idx files.

    Args:
        pairs: (name, prefix) of each; see ``find_pairs``.

    Raises:
        DatasetError: a pair is damaged, or documents differ in length.
    """

    manifest = None

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._names = [name for name, _ in pairs]
        self._prefixes = [prefix for _, prefix in pairs]
        counts, shortest, longest, hashes = [], [], [], []
        for prefix in self._prefixes:
            with naming_limits(prefix):
                reader = ShardReader(prefix)
                lengths = reader.lengths
                hashes.append((sha256_of_file(Path(f"{prefix}.idx")), reader.bin_bytes))
            counts.append(len(reader))
            shortest.append(lengths.min())
            longest.append(lengths.max())
        if min(shortest) != max(longest) or min(shortest) < 1:
            raise DatasetError(
                f"the documents have between {min(shortest)} and {max(longest)} tokens; every clip "
                "must have the same number."
            )
        self.seq_length = int(min(shortest))
        self.fingerprint = sha256_of_json(hashes)
        super().__init__(np.array(counts, np.int64))

    def prefix(self, shard: int) -> str:
        return self._prefixes[shard]

    def _source(self, shard: int, number: int) -> str:
        return f"{self._names[shard]}:{number}"

    def row(self, document: int) -> DocumentRow:
        shard, number = self.locate(document)
        return DocumentRow(number, self._source(shard, number))

    def source_runs(self) -> SourceRuns:
        counts = np.diff(self.ends, prepend=0).tolist()
        return SourceRuns.of(
            (self._source(shard, number), 1)
            for shard, count in enumerate(counts)
            for number in range(count)
        )


def find_pairs(path: str) -> list[tuple[str, str]]:
    """(name, prefix) of each .bin/.idx pair, in a stable order; the name goes into sources."""
    folder = Path(path)
    if Path(path + ".bin").is_file() and Path(path + ".idx").is_file():
        return [(folder.name, path)]
    if not folder.is_dir():
        return []
    if (folder / ".bin").is_file() and (folder / ".idx").is_file():
        return [(folder.name, f"{folder}/")]
    numbered = [
        entry
        for entry in folder.iterdir()
        if entry.is_dir() and entry.name.isdecimal() and (entry / ".idx").is_file()
    ]
    if numbered:
        numbered.sort(key=lambda entry: (int(entry.name), entry.name))
        return [(f"{folder.name}/{entry.name}", f"{entry}/") for entry in numbered]
    pairs = sorted(entry.with_suffix("") for entry in folder.glob("*.idx") if entry.stem)
    return [(f"{folder.name}/{pair.name}", str(pair)) for pair in pairs]
