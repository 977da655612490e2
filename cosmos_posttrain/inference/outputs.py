"""The files that a clip becomes, and whether they are there already.

Flows in: ``Item``s; later, results. Flows out: their files. Beside each ``NAME.mp4`` lies a
``NAME.json`` with its settings, and what else was asked for:

    NAME.tokens.npy         (T, H, W) int64
    NAME.log_probs.npy      (T, H, W) float32, nats; NaN for given tokens
    NAME.side_by_side.mp4   the clip and the truth beside it

The record gets its name before the clip, the others after it: a clip is complete when all exist,
and a killed run leaves no clip with another clip's record.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cosmos_posttrain import files
from cosmos_posttrain.errors import ConfigError, OutputFolderError, UserError
from cosmos_posttrain.inference.request import GeneratedClip, Request
from cosmos_posttrain.video import write_mp4

# What is written beside a clip where the setting of this name asks for it.
EXTRAS = {
    "save_tokens": ".tokens.npy",
    "save_log_probs": ".log_probs.npy",
    "side_by_side": ".side_by_side.mp4",
}


@dataclass(frozen=True, eq=False)
class Item:
    """One clip to generate and write.

    Attributes:
        make: makes the request; of tokens, which are read when they are needed.
        video: the mp4 to write.
        where: the line that asks for it, of a batch.
        path: the image or video; None for tokens.
        true_tokens: reads all tokens of the clip, those that are given and the truth; None for an
            image or video.
        extras: what else is written, of ``EXTRAS``.
    """

    make: Callable[[], Request]
    video: Path
    where: str = ""
    path: Path | None = None
    true_tokens: Callable[[], Tensor] | None = None
    extras: tuple[str, ...] = ()

    @property
    def request(self) -> Request:
        """What to generate.

        Raises:
            DatasetError: its tokens are damaged.
        """
        return self.make()

    @property
    def record(self) -> Path:
        """The json beside the mp4."""
        return self._beside(".json")

    @property
    def files(self) -> list[Path]:
        """All that is written."""
        return [self.video, self.record, *map(self.extra, self.extras)]

    def extra(self, name: str) -> Path:
        """The file of one of ``EXTRAS``."""
        return self._beside(EXTRAS[name])

    def _beside(self, ending: str) -> Path:
        return self.video.with_name(self.video.name.removesuffix(".mp4") + ending)


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


def is_complete(item: Item, settings: dict[str, Any]) -> bool:
    """Whether the item's outputs are there already, made with these settings.

    Raises:
        OutputFolderError: something else is there.
    """
    if item.video.is_dir():
        raise OutputFolderError(f"{item.video} is a folder; choose another output name.")
    recorded = _recorded_settings(item.record)
    if recorded == settings:
        return all(path.exists() for path in item.files)
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


def write(
    item: Item,
    result: GeneratedClip,
    side_by_side: Callable[[], Iterable[Tensor]],
    more: Callable[[], dict[str, object]],
) -> None:
    """Writes an item's files in place of older ones.

    Args:
        item: with its files.
        result: the clip.
        side_by_side: makes the parts of the clip that has the truth at its right; called where that
            is wanted.
        more: what else the record says; called when all is decoded.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; what was there before is
            there still.
    """

    def write_record() -> None:
        with files.replacing(item.record) as temporary:
            text = files.json_text({**result.record, **more()}, indent=2) + "\n"
            temporary.write_text(text, encoding="utf-8")
            for path in (item.video, *map(item.extra, item.extras)):
                path.unlink(missing_ok=True)

    item.video.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for name in item.extras:
            temporary = stack.enter_context(files.replacing(item.extra(name)))
            _write_extra(name, temporary, item.extra(name), result, side_by_side)
        write_mp4(item.video, result.frame_parts(), result.fps, before_naming=write_record)


def _write_extra(
    name: str,
    temporary: Path,
    path: Path,
    result: GeneratedClip,
    side_by_side: Callable[[], Iterable[Tensor]],
) -> None:
    if name == "side_by_side":
        write_mp4(temporary, side_by_side(), result.fps)
        return
    values = result.tokens if name == "save_tokens" else result.log_probs
    assert values is not None
    try:
        with temporary.open("wb") as file:
            np.save(file, values.numpy())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error
