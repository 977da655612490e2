"""Lists of images and videos, and names for what is made of them.

Flows in: a jsonl file or a folder. Flows out: a line for each input, and a name for its clip.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.text.prompts import prompt_problem
from cosmos_posttrain.video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from cosmos_posttrain.video.files import find_files


@dataclass(frozen=True)
class BatchLine:
    """One input of a list.

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
    if not found.is_file() and Path(visual_input).is_file():
        found = Path(visual_input)
    if not found.is_file():
        raise ConfigError(
            f"{where}: {visual_input} is not a file; paths are relative to the jsonl or to the "
            "folder that the command runs in."
        )
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if prompt is not None and (problem := prompt_problem(prompt)):
        raise ConfigError(f"{where}: its prompt {problem}.")
    return BatchLine(found, prompt, where)


def read_folder(batch_input_path: str, leave_out: str, prompt: str | None) -> list[BatchLine]:
    """The images and videos below a folder, sorted.

    Args:
        batch_input_path: the folder.
        leave_out: a folder below it that is not searched, of the outputs.
        prompt: of all of them.

    Raises:
        ConfigError: there are none.
    """
    known = VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
    paths = find_files(Path(batch_input_path), known, Path(leave_out))
    if not paths:
        raise ConfigError(
            f"--batch_input_path {batch_input_path} holds no video and no image; known extensions "
            f"are {' '.join(sorted(known))}."
        )
    return [BatchLine(path, prompt, str(path)) for path in paths]


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
