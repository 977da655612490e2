"""The output folder: who may write there, what is already done, and when it is complete.

Flows in: the contract and plan of this run, and finished shards. Flows out: the shards still to do,
and at the end the manifest. A run that is killed at any moment leaves a folder that the same
command continues, and finished shards are never touched again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from cosmos_posttrain import files, launch
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.indexed import ShardWriter
from cosmos_posttrain.data.layout import (
    EXTENSIONS,
    FAILURES_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    is_ours,
    prompt_shard_name,
    shard_name,
)
from cosmos_posttrain.data.manifest import MAX_LISTED_FAILURES, DocumentRow, Failure, Manifest
from cosmos_posttrain.data.prompts import PromptRow
from cosmos_posttrain.data.serial import from_plain, to_plain
from cosmos_posttrain.data.shard_table import ShardInfo, ShardTable
from cosmos_posttrain.data.source_runs import runs_of_sidecars
from cosmos_posttrain.data.threads import mapped
from cosmos_posttrain.errors import DatasetError, OutputFolderError, SaveError

MAX_SAID = 10  # warnings
DECODER = "decoder"  # of a plan: name and version of what decoded the videos, one or several
_NOT_RECORDED = "pyav (version not recorded)"  # by earlier versions, which had no other


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
        warnings: what is to be said of its documents, the first of them.
        num_warnings: all of them.
    """

    shard: ShardInfo
    failures: tuple[Failure, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    warnings: tuple[str, ...] = ()
    num_warnings: int = 0


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
        SaveError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(folder).free / 1e9 if folder.is_dir() else 0.0
        raise SaveError(
            f"{folder} could not be written to: {error.strerror or error} ({free:.3f} GB are free "
            "there); finished shards stay, so make room and give the same command again."
        ) from error


def write_shard(
    folder: Path,
    name: str,
    dtype: str,
    documents: Sequence[tuple[DocumentRow, Any]],
    failures: Sequence[Failure],
    rejections: Sequence[Rejection],
    beside: Mapping[str, bytes] | None = None,
) -> ShardRecord:
    """Writes a shard's files and then its record, which makes it count.

    Args:
        folder: where.
        name: of the shard.
        dtype: of the tokens.
        documents: row and tokens of each.
        failures: sources that could not be read.
        rejections: sources that a filter left out.
        beside: contents of further files of the shard, by extension.

    Raises:
        SaveError: the disk is full; the shard does not count.
    """
    rows = [(row.to_json(), tokens) for row, tokens in documents]
    num_sources = len({row.source for row, _ in documents})
    with writing(folder):
        written = _write_files(folder, name, dtype, rows, beside or {})
        info = ShardInfo(name, len(rows), num_sources, written)
        record = ShardRecord(info, tuple(failures), tuple(rejections))
        files.write_json(_record_path(folder, name), to_plain(record))
    return record


def write_prompt_shard(
    folder: Path, name: str, dtype: str, prompts: Sequence[tuple[PromptRow, Any]], cut: list[str]
) -> ShardRecord:
    """As ``write_shard``, of prompts; ``cut`` says which were too long.

    Raises:
        CosmosPosttrainError: the disk is full; the shard does not count.
    """
    rows = [(to_plain(row), numbers) for row, numbers in prompts]
    with writing(folder):
        info = ShardInfo(name, len(rows), len(rows), _write_files(folder, name, dtype, rows))
        record = ShardRecord(info, warnings=tuple(cut[:MAX_SAID]), num_warnings=len(cut))
        files.write_json(_record_path(folder, name), to_plain(record))
    return record


def _write_files(
    folder: Path,
    name: str,
    dtype: str,
    documents: Sequence[tuple[dict[str, Any], Any]],
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """A shard's files, if it has documents; returns size and hash of each by extension."""
    if not documents:
        return {}
    paths = {extension: folder / f"{name}.{extension}" for extension in EXTENSIONS}
    with (
        files.replacing(paths["bin"]) as bin_path,
        files.replacing(paths["idx"]) as idx_path,
        ShardWriter(bin_path, idx_path, dtype) as writer,
    ):
        for _, numbers in documents:
            writer.add(numbers)
        writer.finish()
    files.write_json_lines(paths["jsonl"], [row for row, _ in documents])
    for extension, content in beside.items():
        paths[extension] = folder / f"{name}.{extension}"
        with files.replacing(paths[extension]) as temporary:
            temporary.write_bytes(content)
    return {
        extension: {"sha256": files.sha256_of_file(path), "num_bytes": path.stat().st_size}
        for extension, path in paths.items()
    }


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _read_job(folder: Path) -> tuple[Contract, dict[str, Any]] | None:
    """Contract and plan of what a folder holds, complete or not; None if it says nothing."""
    for name in (MANIFEST_FILE, PLAN_FILE):
        path = folder / name
        if path.is_file():
            value = files.read_json(path, DatasetError, "start anew with --overwrite")
            plan = value.get("plan")
            contract = from_plain(Contract, value.get("contract"), str(path))
            return contract, plan if isinstance(plan, dict) else {}
    return None


def recorded_contract(folder: Path) -> Contract | None:
    """The contract of the data set that a folder holds, complete or not; None if it holds none.

    Raises:
        DatasetError: it is damaged.
    """
    recorded = _read_job(folder)
    return None if recorded is None else recorded[0]


class OutputFolder:
    """One preparation's folder, in the hands of the one process that starts and finishes it.

    Args:
        folder: where shards and manifest go.
        contract: what all documents share.
        plan: what is prepared from what; with the contract it decides whether a folder's earlier
            content is the same job.
        num_shards: shards of the whole job.
        num_prompt_shards: likewise, of prompts.
    """

    def __init__(
        self,
        folder: Path,
        contract: Contract,
        plan: dict[str, Any],
        num_shards: int,
        num_prompt_shards: int = 0,
    ) -> None:
        self.folder = folder
        self.contract = contract
        self.plan = plan
        self._names = [shard_name(number) for number in range(num_shards)]
        self._prompt_names = [prompt_shard_name(number) for number in range(num_prompt_shards)]

    def start(self, overwrite: bool, decoder: Callable[[], str] | None = None) -> list[int] | None:
        """Makes the folder ready and says which shards are still to do; None if it is complete.

        Args:
            overwrite: start anew.
            decoder: gives name and version of what decodes here, for the plan; only asked where
                there is something to decode. None: nothing is decoded.

        Raises:
            OutputFolderError: it holds another data set, and ``overwrite`` is off.
            UserError: of ``decoder``; nothing was written or removed.
            SaveError: the disk is full.
        """
        if overwrite:
            if decoder is not None:
                decoder()
            self._remove_ours()
        earlier = self._check_same_job()
        if (self.folder / MANIFEST_FILE).is_file():
            self._tidy()  # a run may have been killed between the manifest and this
            return None
        missing = self._missing(self._names)
        if decoder is not None:
            name = self._decoder_of(earlier, bool(missing), decoder)
            self.plan = {**self.plan, DECODER: name}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            files.remove_leftovers(self.folder)
            files.write_json(
                self.folder / PLAN_FILE, {"contract": to_plain(self.contract), "plan": self.plan}
            )
        return missing

    def missing_prompts(self) -> list[int]:
        """Which prompt shards are still to do, after ``start``."""
        return self._missing(self._prompt_names)

    def _missing(self, names: list[str]) -> list[int]:
        present = set(os.listdir(self.folder)) if self.folder.is_dir() else set()
        candidates = [name for name in names if f"{name}.json" in present]
        is_done = dict(zip(candidates, mapped(self._is_done, candidates), strict=True))
        return [number for number, name in enumerate(names) if not is_done.get(name, False)]

    def _remove_ours(self) -> None:
        # The manifest goes first: from then on nobody takes the folder for complete.
        (self.folder / MANIFEST_FILE).unlink(missing_ok=True)
        if self.folder.is_dir():
            for name in os.listdir(self.folder):
                if is_ours(name):
                    (self.folder / name).unlink()

    def _check_same_job(self) -> dict[str, Any] | None:
        """The plan of what the folder holds; None if it holds nothing yet."""
        recorded = _read_job(self.folder)
        if recorded is not None:
            contract, theirs = recorded
            difference = self.contract.difference(contract)
            for key, ours in self.plan.items():
                if difference is None and theirs.get(key) != ours:
                    difference = f"{key} {ours} here, {theirs.get(key)} there"
            if difference:
                raise OutputFolderError(
                    f"the output folder {self.folder} holds another data set ({difference}); "
                    "name another folder, or start anew with --overwrite."
                )
            return theirs
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        if any(is_ours(name) for name in names):
            raise OutputFolderError(
                f"the output folder {self.folder} holds shards but neither {MANIFEST_FILE} nor "
                f"{PLAN_FILE}; name another folder, or start anew with --overwrite."
            )
        return None

    def _decoder_of(
        self, earlier: dict[str, Any] | None, is_needed: bool, decoder: Callable[[], str]
    ) -> str:
        """Other libraries give other tokens; another version goes on, and is recorded too."""
        if earlier is None:
            return decoder()
        theirs = str(earlier.get(DECODER, _NOT_RECORDED))
        if not is_needed:
            return theirs
        ours = decoder()
        if ours.split()[0] != theirs.split()[0]:
            raise OutputFolderError(
                f"the shards in {self.folder} were decoded by {theirs}, and {ours} would give "
                "other tokens; go on where the former is installed, or start anew with --overwrite."
            )
        if ours in theirs.split(", "):
            return theirs
        launch.say(f"warning: going on with {ours} what {theirs} began.", error=True)
        return f"{theirs}, {ours}"

    def read_record(self, name: str) -> ShardRecord:
        """The record of a finished shard.

        Raises:
            DatasetError: it is missing or damaged.
        """
        path = _record_path(self.folder, name)
        fix = "delete it and give the same command again"
        return from_plain(ShardRecord, files.read_json(path, DatasetError, fix), str(path))

    def _is_done(self, name: str) -> bool:
        try:
            recorded = self.read_record(name).shard.files
            return all(
                (self.folder / f"{name}.{extension}").stat().st_size == entry["num_bytes"]
                for extension, entry in recorded.items()
            )
        except (DatasetError, OSError, KeyError, TypeError):
            return False

    def finish(self) -> Manifest:
        """Gathers all records into the manifest, writes it and removes what it replaces.

        Raises:
            SaveError: the disk is full.
        """
        with writing(self.folder):
            manifest = self._gather()
            runs = runs_of_sidecars(self._sidecars(manifest.shards))
            manifest = dataclasses.replace(manifest, num_unserved=len(runs.unserved))
            runs.save(self.folder, manifest.fingerprint)
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
                for record in mapped(self.read_record, self._names):
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
            ShardTable(self._prompt_shards()),
        )

    def _prompt_shards(self) -> Iterator[ShardInfo]:
        """The prompts' shards; says which prompts were cut."""
        num_said = num_cut = 0
        for record in mapped(self.read_record, self._prompt_names):
            num_cut += record.num_warnings
            for warning in record.warnings[: MAX_SAID - num_said]:
                launch.say(f"warning: {warning}", error=True)
                num_said += 1
            yield record.shard
        if num_cut > num_said:
            launch.say(f"warning: {num_cut - num_said} more prompts are cut.", error=True)

    def _sidecars(self, shards: ShardTable) -> Iterator[tuple[Path, bytes, int]]:
        """Path, content and number of documents of every sidecar."""

        def read(shard: int) -> tuple[Path, bytes, int]:
            path = self.folder / f"{shards.name(shard)}.jsonl"
            return path, path.read_bytes(), int(shards.num_documents[shard])

        return mapped(read, np.flatnonzero(shards.num_documents).tolist())

    def _tidy(self) -> None:
        """Removes what the manifest replaces; the plan goes last, so a killed run is noticed."""
        if (self.folder / PLAN_FILE).is_file():
            for name in (*self._names, *self._prompt_names):
                _record_path(self.folder, name).unlink(missing_ok=True)
            (self.folder / PLAN_FILE).unlink()
