"""Compares every file of a prepared folder with the manifest. No torch.

Flows in: a prepared folder. Flows out: one line for each damaged file. Nothing is written.
"""

from __future__ import annotations

from pathlib import Path

from cosmos_posttrain import launch
from cosmos_posttrain.data.config import VerifyConfig, validate
from cosmos_posttrain.data.limits import naming_limits
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.data.shard_table import ShardTable
from cosmos_posttrain.data.source_runs import load_runs
from cosmos_posttrain.data.threads import mapped
from cosmos_posttrain.errors import DatasetError, PartialFailureError
from cosmos_posttrain.files import sha256_of_file
from cosmos_posttrain.runlog import ProgressDisplay


def verify(config: VerifyConfig) -> None:
    """Reads everything and names all damaged files.

    Raises:
        DatasetError: there is no manifest to compare with, or it is damaged itself.
        PartialFailureError: files are damaged; each was named.
        UserError: too many files are open.
    """
    validate(config)
    folder = Path(config.data_path)
    manifest = Manifest.load(folder)
    tables = (manifest.shards, manifest.prompts)
    shards = [(table, shard) for table in tables for shard in range(len(table))]
    progress = ProgressDisplay(len(shards), "shards")
    num_damaged = 0

    def problems_of(place: tuple[ShardTable, int]) -> list[str]:
        found = []
        table, shard = place
        for extension, column in table.files.items():
            if column.num_bytes[shard] >= 0:
                path = folder / f"{table.name(shard)}.{extension}"
                recorded = int(column.num_bytes[shard]), column.hash_of(shard)
                found += _problems_of_file(path, *recorded)
        return found

    for problems in mapped(problems_of, shards, config.num_workers, chunk_size=1):
        for problem in problems:
            num_damaged += 1
            progress.say(problem)
        progress.advance(f"{num_damaged} damaged files")
    num_files = sum(
        int((column.num_bytes >= 0).sum()) for table in tables for column in table.files.values()
    )
    try:
        load_runs(folder, manifest.fingerprint, manifest.num_documents)
    except DatasetError as error:
        num_damaged += 1
        launch.say(str(error), error=True)
    if num_damaged:
        raise PartialFailureError(
            f"{num_damaged} files of {folder} are damaged or missing; prepare it again, or copy "
            "them anew from where they are whole."
        )
    launch.say(
        f"{folder} is whole: {num_files} files of {len(shards)} shards are what its manifest says."
    )


def _problems_of_file(path: Path, num_bytes: int, sha256: str) -> list[str]:
    """What is wrong with one file, in at most one sentence."""
    try:
        with naming_limits(str(path)):
            found = path.stat().st_size
            if found != num_bytes:
                return [f"{path} has {found} bytes, the manifest says {num_bytes}"]
            if sha256_of_file(path) != sha256:
                return [f"{path} has another sha256 than the manifest says"]
    except FileNotFoundError:
        return [f"{path} is missing"]
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    return []
