"""Inputs, the files that they become, and which of those are there already.

Flows in: paths and a jsonl file; later, results. Flows out: items to do, and their files. Beside
each ``NAME.mp4`` lies a ``NAME.json`` with its settings. The record gets its name before the clip:
a clip is complete when both exist, and a killed run leaves no clip with another clip's record.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain import files
from cosmos_posttrain.errors import ConfigError, OutputFolderError
from cosmos_posttrain.inference.request import GeneratedClip, Request
from cosmos_posttrain.text.prompts import prompt_problem
from cosmos_posttrain.video import write_mp4


@dataclass(frozen=True, eq=False)
class Item:
    """One clip to generate and write.

    Attributes:
        request: what to generate.
        video: the mp4 to write.
        where: the line that asks for it, of a batch.
    """

    request: Request
    video: Path
    where: str = ""

    @property
    def record(self) -> Path:
        """The json beside the mp4."""
        return self.video.with_name(self.video.name.removesuffix(".mp4") + ".json")


def single_output(video_save_name: str, video_save_folder: str) -> Path:
    """The mp4 of a run with one input; a bare name lies in the folder.

    Raises:
        ConfigError: an empty name.
    """
    if not video_save_name or video_save_name.endswith(("/", os.sep)):
        raise ConfigError(f"--video_save_name {video_save_name!r} is not a file name.")
    name = Path(video_save_name)
    path = Path(video_save_folder) / name if name.name == video_save_name else name
    return path if path.name.endswith(".mp4") else path.with_name(f"{path.name}.mp4")


@dataclass(frozen=True)
class BatchLine:
    """One line of a batch.

    Attributes:
        path: the image or video.
        prompt: what is to be seen; None without one.
        where: file and line, for messages.
    """

    path: Path
    prompt: str | None = None
    where: str = ""


def read_batch(batch_input_path: str) -> list[BatchLine]:
    """The inputs of a jsonl file.

    Raises:
        ConfigError: an unreadable file or line, an input that does not exist, or an empty prompt.
    """
    path = Path(batch_input_path)
    try:
        # Not splitlines: a JSON string may hold characters that end a line elsewhere.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--batch_input_path {path} cannot be read ({error}).") from error
    inputs = [_read_line(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not inputs:
        raise ConfigError(f"--batch_input_path {path} names no input; write one a line.")
    return inputs


def _read_line(path: Path, number: int, line: str) -> BatchLine:
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}, is not JSON: {error}.") from error
    visual_input = row.get("visual_input") if isinstance(row, dict) else None
    if not isinstance(visual_input, str) or not visual_input:
        raise ConfigError(f'{where}, has no visual_input; write {{"visual_input": "video.mp4"}}.')
    found = path.parent / visual_input
    if not found.is_file():
        raise ConfigError(f"{where}: {found} is not a file; paths are relative to the jsonl.")
    prompt = row.get("prompt")
    if prompt is not None and (problem := prompt_problem(prompt)):
        raise ConfigError(f"{where}: its prompt {problem}.")
    return BatchLine(found, prompt, where)


def output_names(lines: Sequence[BatchLine]) -> list[str]:
    """A name for each line's clip: that of its input, without extension.

    Inputs of the same name get as many of the folders above them as tell them apart:
    ``a/rgb.mp4`` and ``b/rgb.mp4`` become ``a_rgb`` and ``b_rgb``. An input that comes again with
    another prompt gets a number: ``rgb``, ``rgb_2``.

    Raises:
        ConfigError: the same line twice, or inputs that only their extensions tell apart.
    """
    spelled = [Path(os.path.normpath(line.path.absolute())) for line in lines]
    texts = [(path, line.prompt) for path, line in zip(spelled, lines, strict=True)]
    twice = next((text for text, count in Counter(texts).items() if count > 1), None)
    if twice is not None:
        what = "input" if twice[1] is None else "input with its prompt"
        raise ConfigError(f"{twice[0]} is named twice in the batch; name each {what} once.")
    distinct = list(dict.fromkeys(spelled))
    first = dict(zip(distinct, _distinct_names(distinct), strict=True))
    taken, names, seen = set(first.values()), [], Counter[Path]()
    for path in spelled:
        name = first[path]
        seen[path] += 1
        number = seen[path]
        while number > 1 and name in taken:
            name = f"{first[path]}_{number}"
            number += 1
        taken.add(name)
        names.append(name)
    return names


def _distinct_names(spelled: Sequence[Path]) -> list[str]:
    """Each path's last parts, as few as tell all of them apart."""
    parts = [(*path.parts[1:-1], path.stem) for path in spelled]
    depths = [1] * len(parts)
    while True:
        names = ["_".join(p[-depth:]) for p, depth in zip(parts, depths, strict=True)]
        counts = Counter(names)
        clashing = [i for i, name in enumerate(names) if counts[name] > 1]
        if not clashing:
            return names
        growing = [i for i in clashing if depths[i] < len(parts[i])]
        if not growing:
            first, second = (spelled[i] for i in clashing[:2])
            raise ConfigError(
                f"{first} and {second} would have the same output; rename one of them."
            )
        for i in growing:
            depths[i] += 1


def check_inputs_survive(items: Sequence[Item]) -> None:
    """Refuses outputs that would replace inputs.

    Raises:
        ConfigError: names the input.
    """
    paths = (item.request.path for item in items)
    inputs = {Path(path).resolve() for path in paths if path is not None}
    for item in items:
        for output in (item.video, item.record):
            if output.resolve() in inputs:
                raise ConfigError(
                    f"{output} is an input and would be replaced by an output; choose another "
                    "--video_save_folder or --video_save_name."
                )


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


def write(item: Item, result: GeneratedClip) -> None:
    """Writes an item's clip and record in place of older ones.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; what was there before is
            there still.
    """
    frames = result.frames

    def write_record() -> None:
        with files.replacing(item.record) as temporary:
            text = files.json_text(result.record, indent=2) + "\n"
            temporary.write_text(text, encoding="utf-8")
            item.video.unlink(missing_ok=True)

    write_mp4(item.video, frames, result.fps, before_naming=write_record)
