"""The output folder: who may write there, what is already done, and when it is complete.

Flows in: the contract and plan of this run, and finished shards. Flows out: the shards still to do,
and at the end the manifest. A run that is killed at any moment leaves a folder that the same
command continues, and finished shards are never touched again.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain import files
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.indexed import ShardWriter
from cosmos_posttrain.data.layout import (
    FAILURES_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    is_ours,
    shard_name,
)
from cosmos_posttrain.data.manifest import (
    MAX_LISTED_FAILURES,
    DocumentRow,
    Failure,
    Manifest,
    ShardInfo,
)
from cosmos_posttrain.data.serial import from_plain, to_plain
from cosmos_posttrain.errors import DatasetError, OutputFolderError

EXTENSIONS = ("bin", "idx", "jsonl")


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard leaves behind until the manifest takes it up."""

    shard: ShardInfo
    failures: tuple[Failure, ...]


def check_writable(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything that preparation did not write; changes nothing.

    Raises:
        OutputFolderError: it holds something else, is a file, or cannot be written to.
    """
    files.check_writable(folder)
    foreign = files.foreign_names(folder, is_ours)
    if foreign and not overwrite:
        raise OutputFolderError(
            f"the output folder {folder} holds something else ({foreign[0]}); name a new or "
            "empty folder."
        )


class OutputFolder:
    """One preparation's folder.

    Args:
        folder: where shards and manifest go.
        contract: what all documents share.
        plan: what is prepared from what; with the contract it decides whether a folder's earlier
            content is the same job.
        num_shards: shards of the whole job.
    """

    def __init__(
        self, folder: Path, contract: Contract, plan: dict[str, Any], num_shards: int
    ) -> None:
        self.folder = folder
        self.contract = contract
        self.plan = plan
        self.num_shards = num_shards

    def start(self, overwrite: bool) -> list[int] | None:
        """Makes the folder ready and says which shards are still to do; None if it is complete.

        Raises:
            OutputFolderError: it holds another data set, and ``overwrite`` is off.
        """
        if overwrite:
            self._remove_ours()
        self._check_same_job()
        if (self.folder / MANIFEST_FILE).is_file():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(self.folder)
        files.write_json(
            self.folder / PLAN_FILE, {"contract": to_plain(self.contract), "plan": self.plan}
        )
        return [number for number in range(self.num_shards) if not self._is_done(number)]

    def _remove_ours(self) -> None:
        # The manifest goes first: from then on nobody takes the folder for complete.
        (self.folder / MANIFEST_FILE).unlink(missing_ok=True)
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if is_ours(path.name):
                    path.unlink()

    def _check_same_job(self) -> None:
        for name in (MANIFEST_FILE, PLAN_FILE):
            path = self.folder / name
            if path.is_file():
                value = files.read_json(path, DatasetError, "start anew with --overwrite")
                contract = from_plain(Contract, value.get("contract"), str(path))
                difference = self.contract.difference(contract)
                theirs = value.get("plan")
                theirs = theirs if isinstance(theirs, dict) else {}
                for key, ours in self.plan.items():
                    if difference is None and theirs.get(key) != ours:
                        difference = f"{key} {ours} here, {theirs.get(key)} there"
                if difference:
                    raise OutputFolderError(
                        f"the output folder {self.folder} holds another data set ({difference}); "
                        "name another folder, or start anew with --overwrite."
                    )
                return
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        if any(is_ours(name) for name in names):
            raise OutputFolderError(
                f"the output folder {self.folder} holds shards but neither {MANIFEST_FILE} nor "
                f"{PLAN_FILE}; name another folder, or start anew with --overwrite."
            )

    def _record_path(self, number: int) -> Path:
        return self.folder / f"{shard_name(number)}.json"

    def read_record(self, number: int) -> ShardRecord:
        """The record of a finished shard.

        Raises:
            DatasetError: it is missing or damaged.
        """
        path = self._record_path(number)
        return from_plain(ShardRecord, files.read_json(path, DatasetError), str(path))

    def _is_done(self, number: int) -> bool:
        try:
            recorded = self.read_record(number).shard.files
            return all(
                (self.folder / f"{shard_name(number)}.{extension}").stat().st_size
                == entry["num_bytes"]
                for extension, entry in recorded.items()
            )
        except (DatasetError, OSError, KeyError, TypeError):
            return False

    def write_shard(
        self,
        number: int,
        documents: list[tuple[DocumentRow, Any]],
        failures: list[Failure],
    ) -> None:
        """Writes a shard's files and then its record, which makes it count."""
        name = shard_name(number)
        written: dict[str, dict[str, Any]] = {}
        if documents:
            paths = {extension: self.folder / f"{name}.{extension}" for extension in EXTENSIONS}
            with (
                files.replacing(paths["bin"]) as bin_path,
                files.replacing(paths["idx"]) as idx_path,
            ):
                writer = ShardWriter(bin_path, idx_path, self.contract.dtype)
                for _, tokens in documents:
                    writer.add(tokens)
                writer.finish()
            files.write_json_lines(paths["jsonl"], [row.to_json() for row, _ in documents])
            for extension, path in paths.items():
                written[extension] = {
                    "sha256": files.sha256_of_file(path),
                    "num_bytes": path.stat().st_size,
                }
        num_sources = len({row.source for row, _ in documents})
        info = ShardInfo(name, len(documents), num_sources, written)
        files.write_json(self._record_path(number), to_plain(ShardRecord(info, tuple(failures))))

    def finish(self) -> Manifest:
        """Gathers all records into the manifest, writes it and removes what it replaces."""
        records = [self.read_record(number) for number in range(self.num_shards)]
        failures = [failure for record in records for failure in record.failures]
        manifest = Manifest(
            self.contract,
            self.plan,
            sum(record.shard.num_documents for record in records),
            len(failures),
            tuple(failures[:MAX_LISTED_FAILURES]),
            tuple(record.shard for record in records),
        )
        if failures:
            files.write_json_lines(self.folder / FAILURES_FILE, [to_plain(f) for f in failures])
        manifest.save(self.folder)
        for number in range(self.num_shards):
            self._record_path(number).unlink()
        (self.folder / PLAN_FILE).unlink()
        return manifest
