"""Finding and opening prepared data, in our layout and in the original recipe's.

Flows in: a folder or a path prefix. Flows out: opened shards with the source of each document.

Layouts:
  ours        a folder with ``manifest.json``, shards and their sidecars
  original    files named exactly ``.bin`` and ``.idx`` in a folder, or in its numbered subfolders
  plain       ``PREFIX.bin`` and ``PREFIX.idx``, or a folder of such pairs
The last two have no manifest: each document counts as its own source.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.data.indexed import ShardReader
from cosmos_posttrain.data.layout import MANIFEST_FILE, PLAN_FILE
from cosmos_posttrain.data.manifest import DocumentRow, Manifest, ShardInfo
from cosmos_posttrain.data.serial import from_plain
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import sha256_of_file, sha256_of_json


@dataclass
class Shard:
    """One opened shard: its documents, and the source of each."""

    reader: ShardReader
    sources: list[str]
    sidecar: Path | None = None

    def row(self, document: int) -> DocumentRow:
        """The manifest row of a document; only the source is known without a sidecar."""
        if self.sidecar is None:
            return DocumentRow(document, self.sources[document])
        with self.sidecar.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                if number == document:
                    return from_plain(DocumentRow, json.loads(line), str(self.sidecar))
        raise DatasetError(f"{self.sidecar} is damaged: it has no row {document}.")


@dataclass
class ShardSet:
    """All shards below one path.

    Attributes:
        shards: opened, in order.
        manifest: None for folders that were not prepared by this program.
        fingerprint: equal only for equal data.
    """

    shards: list[Shard]
    manifest: Manifest | None
    fingerprint: str


def open_shards(path: str | Path) -> ShardSet:
    """Opens whatever prepared data lies at ``path``, a folder or a prefix.

    Raises:
        DatasetError: nothing is there, or it is damaged or incomplete.
    """
    folder = Path(path)
    if any((folder / name).is_file() for name in (MANIFEST_FILE, PLAN_FILE)):
        return _open_ours(folder)
    prefixes = _foreign_prefixes(str(path))
    if not prefixes:
        what = "holds no prepared data" if folder.exists() else "does not exist"
        raise DatasetError(
            f"{path} {what}; name a folder that prepare_dataset.py wrote, or a prefix of "
            ".bin and .idx files."
        )
    shards = []
    for name, prefix in prefixes:
        reader = ShardReader(prefix)
        shards.append(Shard(reader, [f"{name}:{number}" for number in range(len(reader))]))
    hashes = [
        (sha256_of_file(Path(f"{prefix}.idx")), Path(f"{prefix}.bin").stat().st_size)
        for _, prefix in prefixes
    ]
    return ShardSet(shards, None, sha256_of_json(hashes))


def _open_ours(folder: Path) -> ShardSet:
    manifest = Manifest.load(folder)
    shards = [_open_shard(folder, info, manifest) for info in manifest.shards if info.files]
    return ShardSet(shards, manifest, manifest.fingerprint)


def _open_shard(folder: Path, info: ShardInfo, manifest: Manifest) -> Shard:
    for extension, recorded in info.files.items():
        path = folder / f"{info.name}.{extension}"
        num_bytes = path.stat().st_size if path.is_file() else -1
        if num_bytes != recorded["num_bytes"]:
            raise DatasetError(
                f"{path} is damaged: it has {num_bytes} bytes, the manifest says "
                f"{recorded['num_bytes']}; prepare the data set again."
                if num_bytes >= 0
                else f"{path} is missing; prepare the data set again."
            )
    reader = ShardReader(folder / info.name)
    sidecar = folder / f"{info.name}.jsonl"
    try:
        with sidecar.open(encoding="utf-8") as file:
            sources = [sys.intern(str(json.loads(line)["source"])) for line in file]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{sidecar} is damaged: {error}; prepare the data again.") from error
    if not len(reader) == len(sources) == info.num_documents:
        raise DatasetError(
            f"{folder / info.name} is damaged: {len(reader)} documents, {len(sources)} rows, and "
            f"{info.num_documents} in the manifest; prepare the data set again."
        )
    seq_length = manifest.contract.seq_length
    if (reader.lengths != seq_length).any():
        raise DatasetError(
            f"{folder / info.name} is damaged: not every document has {seq_length} tokens; "
            "prepare the data set again."
        )
    return Shard(reader, sources, sidecar)


def _foreign_prefixes(path: str) -> list[tuple[str, str]]:
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
