"""The sample clips of an evaluation: which are shown, and their bytes for the page.

Flows in: a folder ``clips/NAME/*.mp4`` beside a ``metrics.json``, its rows and failures. Flows out:
``SampleClip``s, failures first, then those that came out worst; as many as fit a number of bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cosmos_posttrain.errors import VideoError
from cosmos_posttrain.evaluation.report import shapes
from cosmos_posttrain.evaluation.report.curves import is_number
from cosmos_posttrain.evaluation.report.evaluations import Evaluation

CLIPS_FOLDER = "clips"
# Shown in this order; a film of another name comes after them.
_ORDER = ("truth", "reconstruction", "generated")
_TITLES = {"generated": "generation"}
_POSTER_QUALITY = 70
_NAMES = ("name", "clip", "video", "file")
_FLAGS = ("defects", "failures", "flags", "failed", "detected", "error")
_GIVEN = ("num_input_frames", "num_given_frames", "given_frames")


@dataclass(frozen=True)
class Film:
    """One video of a clip.

    Attributes:
        title: ``truth``, ``reconstruction``, ``generation``, ``generation, seed 1``.
        path: the mp4.
        source: as a ``data:`` address.
        poster: its first frame, likewise.
    """

    title: str
    path: Path
    source: str = ""
    poster: str = ""


@dataclass(frozen=True)
class SampleClip:
    """Videos of one clip, which play together.

    Attributes:
        name: as the evaluation has it.
        evaluation: its name.
        films: in the order in which they are shown.
        flags: what detectors found wrong with it, in words; empty is fine.
        figures: what its row says of it.
        num_frames: of the longest film.
        num_given: frames at the start that the model was given; 0 where that is not known.
        fps: frames a second.
        size: (height, width) of the pictures.
    """

    name: str
    evaluation: str
    films: list[Film]
    flags: list[str]
    figures: dict[str, float]
    num_frames: int = 0
    num_given: int = 0
    fps: float = 0.0
    size: tuple[int, int] = (0, 0)

    @property
    def num_bytes(self) -> int:
        """In the page."""
        return sum(len(film.source) + len(film.poster) for film in self.films)


@dataclass(frozen=True)
class Selection:
    """The clips of a page.

    Attributes:
        clips: with their bytes.
        num_left_out: further clips that lie there.
        unreadable: what is wrong with a clip that could not be shown, a sentence each.
    """

    clips: list[SampleClip]
    num_left_out: int
    unreadable: list[str]


def choose_clips(evaluations: Sequence[Evaluation], max_clips: int, max_bytes: int) -> Selection:
    """Clips for the page: failures first, then the worst of each evaluation in turn."""
    found = _interleaved([_listed(evaluation) for evaluation in evaluations])
    found.sort(key=lambda clip: not clip.flags)
    chosen: list[SampleClip] = []
    left_out, num_bytes, unreadable = 0, 0, list[str]()
    for clip in found:
        if len(chosen) == max_clips or num_bytes + _estimate(clip) > max_bytes:
            left_out += 1
            continue
        try:
            loaded = _load(clip)
        except VideoError as error:
            unreadable.append(str(error))
            continue
        if num_bytes + loaded.num_bytes > max_bytes:
            left_out += 1
            continue
        num_bytes += loaded.num_bytes
        chosen.append(loaded)
    return Selection(chosen, left_out, unreadable)


def _interleaved(lists: list[list[SampleClip]]) -> list[SampleClip]:
    longest = max(map(len, lists), default=0)
    return [clips[place] for place in range(longest) for clips in lists if place < len(clips)]


def _listed(evaluation: Evaluation) -> list[SampleClip]:
    """All clips of one evaluation, failures first, then worst first; nothing is opened."""
    folder = evaluation.folder / CLIPS_FOLDER
    if not folder.is_dir():
        return []
    rows = {name_of(row): row for row in [*evaluation.rows, *evaluation.failures]}
    flagged = {name_of(row): flags_of(row) or ["failed"] for row in evaluation.failures}
    given = next((v for k in _GIVEN if is_number(v := evaluation.settings.get(k))), 0)
    clips = []
    for inner in sorted(folder.iterdir()):
        films = list(_films(inner)) if inner.is_dir() else []
        if not films:
            continue
        row = rows.get(inner.name) or _by_stem(rows, inner.name)
        flags = flagged.get(inner.name) or flags_of(row)
        figures = {k: v for k, v in row.items() if is_number(v) and shapes.is_known(k)}
        clips.append(
            SampleClip(inner.name, evaluation.name, films, flags, figures, num_given=int(given))
        )
    return sorted(clips, key=lambda clip: (not clip.flags, clip.figures.get("psnr", float("inf"))))


def _by_stem(rows: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    return next((row for key, row in rows.items() if Path(key).stem == name), {})


def name_of(row: dict[str, Any]) -> str:
    """What a row is about."""
    return next((str(row[key]) for key in _NAMES if row.get(key) is not None), "")


def flags_of(row: dict[str, Any]) -> list[str]:
    """What a row says was wrong with its clip, in words."""
    for key in _FLAGS:
        value = row.get(key)
        if isinstance(value, list):
            words = [_words(item) for item in value if item]
        elif isinstance(value, dict):
            words = [str(name) for name, item in value.items() if item]
        elif isinstance(value, str):
            words = [value] if value else []
        else:
            words = [key] if value is True else []
        if words:
            return [word.replace("_", " ") for word in words]
    return []


def _words(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    kind = str(next((item[key] for key in ("kind", "reason", "error") if key in item), "defect"))
    return f"{kind} from frame {item['frame'] + 1} on" if is_number(item.get("frame")) else kind


def _films(folder: Path) -> Iterator[Film]:
    def rank(path: Path) -> tuple[int, str]:
        first = path.stem.partition("_")[0]
        return (_ORDER.index(first) if first in _ORDER else len(_ORDER)), path.stem

    for path in sorted(folder.glob("*.mp4"), key=rank):
        first, _, rest = path.stem.partition("_")
        title = _TITLES.get(first, first)
        if rest:
            title += f", {rest.replace('seed', 'seed ').replace('_', ' ')}"
        yield Film(title, path)


def _estimate(clip: SampleClip) -> int:
    return sum(_encoded(film.path.stat().st_size) for film in clip.films)


def _encoded(num_bytes: int) -> int:
    return (num_bytes + 2) // 3 * 4


def _load(clip: SampleClip) -> SampleClip:
    """Reads the films' bytes and first frames.

    Raises:
        VideoError: one of them cannot be read.
    """
    from cosmos_posttrain.video import probe, read_clips  # with them comes torch

    infos = [probe(film.path) for film in clip.films]
    first = infos[0]
    films = []
    for film, info in zip(clip.films, infos, strict=True):
        picture = read_clips(film.path, [0], 1, info.height, info.width)[0].frames[:, 0]
        films.append(
            replace(
                film,
                source=_address("video/mp4", film.path.read_bytes()),
                poster=_address("image/jpeg", _jpeg(picture.permute(1, 2, 0).numpy())),
            )
        )
    return replace(
        clip,
        films=films,
        num_frames=max(info.num_frames for info in infos),
        num_given=min(clip.num_given, first.num_frames),
        fps=first.fps or 24.0,
        size=(first.height, first.width),
    )


def _jpeg(pixels: Any) -> bytes:
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "JPEG", quality=_POSTER_QUALITY)
    return target.getvalue()


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
