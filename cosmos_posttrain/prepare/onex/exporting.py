"""Export: an imported folder becomes 1X's own files again, byte for byte.

Flows in: a folder that ``importing.py`` wrote. Flows out: a new folder with the files of 1X's
layout, which gets its name when it is complete. Each of our shards is read and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from cosmos_posttrain import files, launch
from cosmos_posttrain.data.documents import open_shards
from cosmos_posttrain.data.layout import SEGMENTS_EXTENSION, STATES_EXTENSION
from cosmos_posttrain.data.prepared import PreparedShards
from cosmos_posttrain.errors import DatasetError, OutputFolderError
from cosmos_posttrain.prepare.folder import writing
from cosmos_posttrain.prepare.onex.folder import OnexShard
from cosmos_posttrain.prepare.onex.importing import WindowRange, window_ranges
from cosmos_posttrain.prepare.onex.versions import VERSIONS, OnexVersion
from cosmos_posttrain.runlog import ProgressDisplay


def export_onex(data_path: str | Path, output_dir: str | Path) -> None:
    """Writes 1X's files.

    Args:
        data_path: an imported folder.
        output_dir: a new or empty folder.

    Raises:
        DatasetError: the folder is no import, or damaged.
        OutputFolderError: the output folder is not empty, or another process writes it.
        SaveError: the disk is full.
    """
    imported, output = open_import(data_path), Path(output_dir).absolute()
    files.check_writable(output)
    if output.is_dir() and any(output.iterdir()):
        raise OutputFolderError(f"the output folder {output} is not empty; name a new one.")
    with files.locked(output.parent, output, only={output.name}):
        files.remove_leftovers(output.parent, {output.name})
        with writing(output.parent), files.replacing(output) as temporary:
            for name, text in imported.metadata.items():
                path = _within(temporary, name)
                path.write_bytes(text.encode())
            progress = ProgressDisplay(len(imported.ranges), "shards")
            for shard in imported.onex_shards:
                _write_shard(imported, shard, temporary, progress)
    launch.say(f"wrote {len(imported.onex_shards)} shards of 1X v{imported.version.name}: {output}")


class ImportedOnex:
    """An imported folder, opened, and what it was imported from.

    Attributes:
        shards: its documents.
        version: of 1X's files.
        onex_shards: 1X's.
        metadata: text of 1X's metadata files by name.
        ranges: the windows of each of the folder's shards.

    Raises:
        DatasetError: its manifest's plan is not an import's, or damaged.
    """

    def __init__(self, shards: PreparedShards) -> None:
        self.shards = shards
        plan = shards.manifest.plan
        version = str(plan.get("imported_from", "")).removeprefix("1X v")
        if version not in VERSIONS:
            raise DatasetError(
                f"{shards.folder} was not imported from 1X's data; name a folder that "
                "prepare_dataset.py --input_tokens_dir wrote."
            )
        self.version: OnexVersion = VERSIONS[version]
        try:
            self.token_dtype = np.dtype(plan["token_dtype"])
            self.metadata = {str(name): str(text) for name, text in plan["onex_metadata"].items()}
            self.onex_shards = [_onex_shard(n, v) for n, v in enumerate(plan["onex_shards"])]
            self.ranges = window_ranges(self.onex_shards, self.version)
            counts = [item.num_windows for item in self.ranges]
            fits = counts == shards.manifest.shards.num_documents.tolist()
        except (KeyError, TypeError, ValueError, AttributeError):
            fits = False
        if not fits:
            raise DatasetError(
                f"{shards.folder}/manifest.json is damaged: what it says of 1X's files does not "
                "fit its shards; import them again."
            )


def open_import(path: str | Path) -> ImportedOnex:
    """Opens an imported folder.

    Raises:
        DatasetError: nothing is there, it is damaged, or no import.
    """
    shards = open_shards(path)
    if not isinstance(shards, PreparedShards):
        raise DatasetError(
            f"{path} has no manifest; name a folder that prepare_dataset.py --input_tokens_dir "
            "wrote."
        )
    return ImportedOnex(shards)


def _onex_shard(number: int, value: dict[str, Any]) -> OnexShard:
    states = tuple((str(name), int(width)) for name, width in value["states"])
    return OnexShard(number, int(value["num_frames"]), value["video"], value["segments"], states)


def _within(folder: Path, name: str) -> Path:
    """A file's path in the folder, whose own folder is made."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"the manifest names a file outside of its folder ({name}).")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _write_shard(
    imported: ImportedOnex, shard: OnexShard, folder: Path, progress: ProgressDisplay
) -> None:
    with ExitStack() as stack:

        def opened(name: str) -> IO[bytes]:
            return stack.enter_context(_within(folder, name).open("wb"))

        video, segments = opened(shard.video), opened(shard.segments)
        states = [(opened(name), width) for name, width in shard.states]
        for part in (item for item in imported.ranges if item.shard.number == shard.number):
            for tokens in _tokens(imported, part):
                video.write(tokens)
            segments.write(imported.shards.read(part.number, SEGMENTS_EXTENSION))
            if states:
                data = imported.shards.read(part.number, STATES_EXTENSION)
                width = sum(width for _, width in states)
                rows = np.frombuffer(data, np.uint32).reshape(-1, width)
                first = 0
                for file, width in states:
                    file.write(rows[:, first : first + width].tobytes())
                    first += width
            progress.advance("")


def _tokens(imported: ImportedOnex, part: WindowRange) -> Iterator[bytes]:
    """The records of some windows; what fills a last one up is left out where 1X has it not."""
    version, shards = imported.version, imported.shards
    last = part.shard.num_frames - part.first * version.clip.num_frames
    num_records = version.num_records(last)
    per_window = version.clip.seq_length // version.tokens_per_record
    before = int(shards.ends[part.number]) - part.num_windows
    for window in range(part.num_windows):
        tokens = shards.tokens(before + window).astype(imported.token_dtype)
        count = min(per_window, num_records - window * per_window)
        yield tokens[: count * version.tokens_per_record].tobytes()
