"""Inputs, the files that they become, and which of those are there already.

Flows in: paths and a jsonl file. Flows out: items to do. Beside each ``NAME.mp4`` lies a
``NAME.json`` with its settings, written before it: a clip is complete when both exist.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain import files
from cosmos_posttrain.errors import ConfigError, OutputFolderError, UserError


@dataclass(frozen=True)
class Item:
    """One clip to generate.

    Attributes:
        input: the image or video.
        video: the mp4 to write.
    """

    input: Path
    video: Path

    @property
    def record(self) -> Path:
        """The json beside the mp4."""
        return self.video.with_name(self.video.name.removesuffix(".mp4") + ".json")


def single_item(input_path: str, video_save_name: str, video_save_folder: str) -> Item:
    """The item of a run with one input; a bare name lies in the folder.

    Raises:
        ConfigError: an empty name.
    """
    if not video_save_name or video_save_name.endswith(("/", os.sep)):
        raise ConfigError(f"--video_save_name {video_save_name!r} is not a file name.")
    name = Path(video_save_name)
    path = Path(video_save_folder) / name if name.name == video_save_name else name
    if not path.name.endswith(".mp4"):
        path = path.with_name(f"{path.name}.mp4")
    return Item(Path(input_path), path)


def _read_line(path: Path, number: int, line: str) -> Path:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}, is not JSON: {error}.") from error
    visual_input = row.get("visual_input") if isinstance(row, dict) else None
    if not isinstance(visual_input, str) or not visual_input:
        raise ConfigError(
            f'{path}, line {number}, has no visual_input; write {{"visual_input": "video.mp4"}}.'
        )
    found = path.parent / visual_input
    if not found.is_file():
        raise ConfigError(
            f"{path}, line {number}: {found} is not a file; paths are relative to the jsonl."
        )
    return found


def batch_items(batch_input_path: str, video_save_folder: str) -> list[Item]:
    """The items of a jsonl file, named after their inputs.

    Raises:
        ConfigError: an unreadable file or line, an input that does not exist, or two inputs of the
            same name.
    """
    path = Path(batch_input_path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--batch_input_path {path} cannot be read ({error}).") from error
    inputs = [_read_line(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not inputs:
        raise ConfigError(f"--batch_input_path {path} names no input; write one a line.")
    for stem, count in Counter(input_path.stem for input_path in inputs).items():
        if count > 1:
            raise ConfigError(
                f"{path} names {count} inputs called {stem}, whose outputs would overwrite one "
                "another; rename them."
            )
    folder = Path(video_save_folder)
    return [Item(input_path, folder / f"{input_path.stem}.mp4") for input_path in inputs]


def is_complete(item: Item, settings: dict[str, Any]) -> bool:
    """Whether the item's outputs are there already, made with these settings.

    Raises:
        OutputFolderError: something else is there.
    """
    if item.video.is_dir():
        raise OutputFolderError(f"{item.video} is a folder; choose another output name.")
    recorded = _recorded_settings(item.record)
    if recorded == settings:
        return item.video.exists()
    if not item.video.exists() and (recorded is not None or not item.record.exists()):
        return False  # a run with other settings was stopped before it wrote the clip
    there = item.video if item.video.exists() else item.record
    raise OutputFolderError(
        f"{there} exists and was not made with these settings; choose another output name, or "
        "replace it with --overwrite."
    )


def _recorded_settings(record: Path) -> dict[str, Any] | None:
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return settings if isinstance(settings, dict) else None


def write_record(item: Item, values: dict[str, Any]) -> None:
    """Writes the json beside the mp4, atomically, and removes an older mp4 first.

    Raises:
        UserError: the folder cannot be written to.
    """
    try:
        item.record.parent.mkdir(parents=True, exist_ok=True)
        item.video.unlink(missing_ok=True)
        files.write_json(item.record, values)
    except OSError as error:
        raise UserError(f"cannot write {item.record}: {error.strerror or error}.") from error
