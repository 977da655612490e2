"""The output folder: who may write there, what is already done, and when it is complete.

Flows in: the contract and plan of this run, and finished shards. Flows out: the shards still to do,
and at the end the manifest. A run that is killed at any moment leaves a folder that the same
command continues, and finished shards are never touched again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_posttrain import files
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.indexed import ShardWriter
from cosmos_posttrain.data.layout import (
    EXTENSIONS,
    FAILURES_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    is_ours,
    shard_name,
)
from cosmos_posttrain.data.manifest import MAX_LISTED_FAILURES, DocumentRow, Failure, Manifest
from cosmos_posttrain.data.serial import from_plain, to_plain
from cosmos_posttrain.data.shard_table import ShardInfo, ShardTable
from cosmos_posttrain.data.source_runs import runs_of_sidecars
from cosmos_posttrain.data.threads import mapped
from cosmos_posttrain.errors import CosmosPosttrainError, DatasetError, OutputFolderError


@dataclass(frozen=True)
class Rejection:
    """A video that a filter left out; the reason is a few words that many videos share."""

    source: str
    reason: str


@dataclass(frozen=True)
class ShardRecord:
    """What became of a shard's sources; lies beside its files until the manifest takes it up.

    Attributes:
        shard: the documents of the sources that were read.
        failures: sources that could not be read.
        rejections: sources that a filter left out.
    """

    shard: ShardInfo
    failures: tuple[Failure, ...]
    rejections: tuple[Rejection, ...] = ()


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


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """One sentence where the disk is full or fails; what was finished before stays.

    Raises:
        CosmosPosttrainError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(folder).free / 1e9 if folder.is_dir() else 0.0
        raise CosmosPosttrainError(
            f"{folder} could not be written to: {error.strerror or error} ({free:.3f} GB are free "
            "there); finished shards stay, so make room and give the same command again."
        ) from error


def write_shard(
    folder: Path,
    number: int,
    dtype: str,
    documents: Sequence[tuple[DocumentRow, Any]],
    failures: Sequence[Failure],
    rejections: Sequence[Rejection],
) -> ShardRecord:
    """Writes a shard's files and then its record, which makes it count.

    Raises:
        CosmosPosttrainError: the disk is full; the shard does not count.
    """
    name = shard_name(number)
    written: dict[str, dict[str, Any]] = {}
    with writing(folder):
        if documents:
            paths = {extension: folder / f"{name}.{extension}" for extension in EXTENSIONS}
            with (
                files.replacing(paths["bin"]) as bin_path,
                files.replacing(paths["idx"]) as idx_path,
                ShardWriter(bin_path, idx_path, dtype) as writer,
            ):
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
        record = ShardRecord(info, tuple(failures), tuple(rejections))
        files.write_json(_record_path(folder, number), to_plain(record))
    return record


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.json"


class OutputFolder:
    """One preparation's folder, in the hands of the one process that starts and finishes it.

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
            CosmosPosttrainError: the disk is full.
        """
        if overwrite:
            self._remove_ours()
        self._check_same_job()
        if (self.folder / MANIFEST_FILE).is_file():
            self._tidy()  # a run may have been killed between the manifest and this
            return None
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(self.folder)
            files.write_json(
                self.folder / PLAN_FILE, {"contract": to_plain(self.contract), "plan": self.plan}
            )
        present = set(os.listdir(self.folder))
        candidates = [
            number for number in range(self.num_shards) if f"{shard_name(number)}.json" in present
        ]
        is_done = dict(zip(candidates, mapped(self._is_done, candidates), strict=True))
        return [number for number in range(self.num_shards) if not is_done.get(number, False)]

    def _remove_ours(self) -> None:
        # The manifest goes first: from then on nobody takes the folder for complete.
        (self.folder / MANIFEST_FILE).unlink(missing_ok=True)
        if self.folder.is_dir():
            for name in os.listdir(self.folder):
                if is_ours(name):
                    (self.folder / name).unlink()

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

    def read_record(self, number: int) -> ShardRecord:
        """The record of a finished shard.

        Raises:
            DatasetError: it is missing or damaged.
        """
        path = _record_path(self.folder, number)
        fix = "delete it and give the same command again"
        return from_plain(ShardRecord, files.read_json(path, DatasetError, fix), str(path))

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

    def finish(self) -> Manifest:
        """Gathers all records into the manifest, writes it and removes what it replaces.

        Raises:
            CosmosPosttrainError: the disk is full.
        """
        with writing(self.folder):
            manifest = self._gather()
            runs_of_sidecars(self._sidecars(manifest.shards)).save(
                self.folder, manifest.fingerprint
            )
            manifest.save(self.folder)
            self._tidy()
        return manifest

    def _gather(self) -> Manifest:
        """The manifest of all records; failures go into their file while they are read."""
        failures: list[Failure] = []
        num_failures = 0
        rejected: Counter[str] = Counter()
        path = self.folder / FAILURES_FILE

        with (
            files.replacing(path) as temporary,
            temporary.open("w", encoding="utf-8", newline="\n") as file,
        ):

            def shards() -> Iterator[ShardInfo]:
                nonlocal num_failures
                for record in mapped(self.read_record, range(self.num_shards)):
                    for failure in record.failures:
                        file.write(files.json_text(to_plain(failure)) + "\n")
                    num_failures += len(record.failures)
                    failures.extend(record.failures[: MAX_LISTED_FAILURES - len(failures)])
                    rejected.update(rejection.reason for rejection in record.rejections)
                    yield record.shard

            table = ShardTable(shards())
        if not num_failures:
            path.unlink()
        return Manifest(
            self.contract,
            self.plan,
            int(table.num_documents.sum()),
            num_failures,
            tuple(failures),
            table,
            dict(sorted(rejected.items())),
        )

    def _sidecars(self, shards: ShardTable) -> Iterator[tuple[Path, bytes, int]]:
        """Path, content and number of documents of every sidecar."""

        def read(shard: int) -> tuple[Path, bytes, int]:
            path = self.folder / f"{shards.name(shard)}.jsonl"
            return path, path.read_bytes(), int(shards.num_documents[shard])

        return mapped(read, np.flatnonzero(shards.num_documents).tolist())

    def _tidy(self) -> None:
        """Removes what the manifest replaces; the plan goes last, so a killed run is noticed."""
        if (self.folder / PLAN_FILE).is_file():
            for number in range(self.num_shards):
                _record_path(self.folder, number).unlink(missing_ok=True)
            (self.folder / PLAN_FILE).unlink()
