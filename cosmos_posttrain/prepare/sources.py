"""The list of source videos, and where clips are cut out of each.

Flows in: a folder of videos or a jsonl file. Flows out: sources in a fixed order, and the first
frames of a video's clips. Nothing is decoded here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from cosmos_posttrain import launch
from cosmos_posttrain.data.threads import mapped
from cosmos_posttrain.errors import ConfigError, UserError


@dataclass(frozen=True, slots=True)
class VideoSource:
    """One video to prepare.

    Attributes:
        name: path relative to the input folder, or as the jsonl file has it, normalised; splits go
            by it, so several sources of one file have one name.
        path: where it is now.
        prompt: None without one.
        prompt_number: among the distinct prompts; None where prompts are not encoded, or this one
            cannot be.
        line: the jsonl file and line of a source whose prompt cannot be encoded.
    """

    name: str
    path: Path
    prompt: str | None = None
    prompt_number: int | None = None
    line: str | None = None


def from_folder(folder: str | Path) -> list[VideoSource]:
    """All videos below a folder, sorted, each once; hidden ones are left out.

    Raises:
        UserError: the folder is missing or holds no video.
    """
    from cosmos_posttrain.video.files import list_videos

    return [VideoSource(path.relative_to(folder).as_posix(), path) for path in list_videos(folder)]


def from_jsonl(path: str | Path) -> list[VideoSource]:
    """One video a line: ``{"visual_input": "a.mp4", "prompt": "..."}``, in the file's order.

    Paths are relative to the jsonl file's folder. A video may stand on several lines, with a prompt
    each: all have the name on the first of them, however they spell it (``a.mp4``, ``./a.mp4``, a
    link to it). A line that says nothing new is left out, which is said. A video that does not
    exist is no error here; it is reported with the other videos that cannot be read.

    Raises:
        UserError: the file is missing, empty, or a line does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the jsonl file {path} does not exist; name a file with a video a line.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # text may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the jsonl file {path} cannot be read: {error}.") from error
    sources = [
        _parse_line(line, path, number) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not sources:
        raise UserError(f"the jsonl file {path} is empty; it needs one video a line.")
    distinct = _one_name_a_file(sources, path.parent)
    if len(distinct) < len(sources):
        launch.say(
            f"note: {len(sources) - len(distinct)} of {len(sources)} lines of {path} repeat the "
            "video and prompt of an earlier line and are left out.",
            error=True,
        )
    return distinct


def _one_name_a_file(sources: Sequence[VideoSource], folder: Path) -> list[VideoSource]:
    """Normalises names, gives all sources of a file the first one's, and drops repetitions."""
    real_path = _RealPaths()
    first: dict[str, VideoSource] = {}
    prompts: dict[str, set[str | None]] = {}  # of the names that come again
    distinct = []
    for source in sources:
        real = real_path(source.path)
        name = os.path.normpath(source.name)
        if name != source.name and real_path(folder / name) != real:
            # ".." behind a linked folder: the text says another file than the system finds.
            name = os.path.relpath(real, real_path(folder))
        if name != source.name:
            source = dataclasses.replace(source, name=name, path=folder / name)
        earlier = first.setdefault(real, source)
        if earlier is not source:
            known = prompts.setdefault(real, {earlier.prompt})
            if source.prompt in known:
                continue
            known.add(source.prompt)
            source = dataclasses.replace(earlier, prompt=source.prompt, line=source.line)
        distinct.append(source)
    return distinct


class _RealPaths:
    """``os.path.realpath``, but each folder is looked up once."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def __call__(self, path: Path) -> str:
        folder, name = os.path.split(path)
        if name in ("", ".", ".."):
            return os.path.realpath(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._folders[folder], name)
        return os.path.realpath(real) if os.path.islink(real) else real


def _parse_line(line: str, path: Path, number: int) -> VideoSource:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"line {number} of {path} is not JSON: {error}.") from error
    name = value.get("visual_input") if isinstance(value, dict) else None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not _is_path(name) or not isinstance(prompt, (str, type(None))):
        raise UserError(
            f'line {number} of {path} does not fit; write {{"visual_input": "a.mp4"}}, '
            'with "prompt": "..." where there is one.'
        )
    line_name = f"line {number} of {path}" if _prompt_problem(prompt) else None
    return VideoSource(name, path.parent / name, prompt, line=line_name)


def _is_path(name: object) -> TypeGuard[str]:
    """True for text that can be a path; one with a NUL or half a character cannot."""
    try:
        return isinstance(name, str) and name != "" and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def arrange(sources: Sequence[VideoSource], seed: int | None) -> list[VideoSource]:
    """The order in which sources are dealt to shards: as listed, or shuffled by a seed."""
    ordered = list(sources)
    if seed is not None:
        random.Random(seed).shuffle(ordered)
    return ordered


def number_prompts(sources: Sequence[VideoSource]) -> tuple[list[VideoSource], list[str]]:
    """Numbers distinct prompts by first appearance.

    Returns:
        The sources with the number of each one's prompt, if it has one that can be encoded; and
        the distinct prompts by number.
    """
    numbers: dict[str, int] = {}
    numbered = []
    for source in sources:
        if _prompt_problem(source.prompt) is None:
            assert source.prompt is not None
            number = numbers.setdefault(source.prompt, len(numbers))
            source = dataclasses.replace(source, prompt_number=number)
        numbered.append(source)
    return numbered, list(numbers)


def missing_prompt(source: VideoSource) -> str | None:
    """Why a source has no prompt that can be encoded, as a sentence; None if it has."""
    problem = _prompt_problem(source.prompt)
    if problem is None:
        return None
    where = "its prompt" if source.line is None else f"its prompt on {source.line}"
    return f"{where} {problem}."


def _prompt_problem(prompt: str | None) -> str | None:
    """What is wrong with a prompt, as the end of a sentence."""
    if prompt is None:
        return 'is missing; write "prompt": "..."'
    from cosmos_posttrain.text.prompts import prompt_problem

    return prompt_problem(prompt)


def sources_sha256(sources: Sequence[VideoSource]) -> str:
    """Hash of names, sizes and prompts: changes when a video is added, replaced or reordered."""

    def row(source: VideoSource) -> str:
        return json.dumps([source.name, _num_bytes(source), source.prompt], separators=(",", ":"))

    # The hash of a JSON list, but millions of rows are never held at once.
    digest, separator = hashlib.sha256(b"["), b""
    for text in mapped(row, sources, chunk_size=250):
        digest.update(separator + text.encode())
        separator = b","
    digest.update(b"]")
    return digest.hexdigest()


def _num_bytes(source: VideoSource) -> int:
    """Size of a source's file; -1 where there is none."""
    try:
        status = os.stat(source.path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def parse_clips_per_video(value: str) -> int | None:
    """``"all"`` is None, else a number of at least 1.

    Raises:
        ConfigError: anything else.
    """
    if value.strip().lower() == "all":
        return None
    if not value.strip().isdecimal() or int(value) < 1:
        raise ConfigError(f"clips_per_video {value!r} is neither a number from 1 up nor 'all'.")
    return int(value)


def clip_starts(num_video_frames: int, span: int, clips_per_video: int | None) -> list[int]:
    """First frames of a video's clips.

    Args:
        num_video_frames: frames of the video.
        span: frames of the video that one clip covers, first to last.
        clips_per_video: clips evenly spread from the video's start to its end, apart where there
            is room and overlapping where there is not; None cuts it into neighbouring clips and
            leaves a rest that fills none.

    Returns:
        Ascending and distinct; a video that is shorter than one clip gives the single start 0.
    """
    last = max(num_video_frames - span, 0)
    if clips_per_video is None:
        return list(range(0, last + 1, span))
    if clips_per_video == 1:
        return [0]
    return sorted({i * last // (clips_per_video - 1) for i in range(clips_per_video)})
