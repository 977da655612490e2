"""The list of source videos, and where clips are cut out of each.

Flows in: a folder of videos or a jsonl file. Flows out: sources in a fixed order, and the first
frames of a video's clips. Nothing is decoded here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain.errors import ConfigError, UserError
from cosmos_posttrain.files import sha256_of_json


@dataclass(frozen=True)
class Source:
    """One video to prepare.

    Attributes:
        name: relative to the input folder, or as the jsonl file has it; splits go by it.
        path: where it is now.
        prompt: None without one.
    """

    name: str
    path: Path
    prompt: str | None = None


def from_folder(folder: str | Path) -> list[Source]:
    """All videos below a folder, sorted; hidden ones are left out.

    Raises:
        UserError: the folder is missing or holds no video.
    """
    from cosmos_posttrain.video.files import list_videos

    return [Source(path.relative_to(folder).as_posix(), path) for path in list_videos(folder)]


def from_jsonl(path: str | Path) -> list[Source]:
    """One video a line: ``{"visual_input": "a.mp4", "prompt": "..."}``, in the file's order.

    Paths are relative to the jsonl file's folder. A video that does not exist is no error here; it
    is reported with the other videos that cannot be read.

    Raises:
        UserError: the file is missing, empty, or a line does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the jsonl file {path} does not exist; name a file with a video a line.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the jsonl file {path} cannot be read: {error}.") from error
    sources = [
        _parse_line(line, path, number) for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not sources:
        raise UserError(f"the jsonl file {path} is empty; it needs one video a line.")
    return sources


def _parse_line(line: str, path: Path, number: int) -> Source:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"line {number} of {path} is not JSON: {error}.") from error
    name = value.get("visual_input") if isinstance(value, dict) else None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name or not isinstance(prompt, (str, type(None))):
        raise UserError(
            f'line {number} of {path} does not fit; write {{"visual_input": "a.mp4"}}, '
            'with "prompt": "..." where there is one.'
        )
    return Source(name, path.parent / name, prompt)


def arrange(sources: Sequence[Source], seed: int | None) -> list[Source]:
    """The order in which sources are dealt to shards: as listed, or shuffled by a seed."""
    ordered = list(sources)
    if seed is not None:
        random.Random(seed).shuffle(ordered)
    return ordered


def sources_sha256(sources: Sequence[Source]) -> str:
    """Hash of names, sizes and prompts: changes when a video is added, replaced or reordered."""
    rows = [
        [source.name, source.path.stat().st_size if source.path.is_file() else -1, source.prompt]
        for source in sources
    ]
    return sha256_of_json(rows)


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
