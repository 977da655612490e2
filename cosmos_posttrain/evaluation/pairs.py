"""Pairs of videos of the same name, and their frames side by side.

Flows in: a folder of reference videos and one of videos to score. Flows out: ``Pair``s, the names
without a partner, and for each pair its frames, two at a time: (H, W, 3) uint8.

Frames are converted to RGB as FFmpeg's own tools and most video readers do by default, not with
the finer chroma of the package's reader: published figures were measured so.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.errors import UserError, VideoError
from cosmos_posttrain.video import VIDEO_EXTENSIONS, VideoInfo, probe
from cosmos_posttrain.video.backend import Fit
from cosmos_posttrain.video.choice import chosen
from cosmos_posttrain.video.files import find_files

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Pair:
    """Two videos of the same name.

    Attributes:
        name: of the target, relative to its folder.
        reference: path.
        target: path.
    """

    name: str
    reference: Path
    target: Path


@dataclass(frozen=True)
class Pairs:
    """What belongs together, and what has no partner.

    Attributes:
        pairs: sorted by name.
        only_reference: names without a target.
        only_target: names without a reference.
    """

    pairs: list[Pair]
    only_reference: list[str] = field(default_factory=list)
    only_target: list[str] = field(default_factory=list)


def find_pairs(reference: Path, target: Path, recursive: bool) -> Pairs:
    """Matches videos by path below their folder, then without extension, then by bare name.

    A name that occurs twice in a folder matches nothing by that name.

    Raises:
        UserError: a folder is missing, or nothing matches.
    """
    left, right = _names(reference, recursive, target), _names(target, recursive, reference)
    pairs: list[Pair] = []
    keys: tuple[Callable[[str], str], ...] = (
        str,
        lambda name: os.path.splitext(name)[0],
        lambda name: Path(name).stem,
    )
    for key in keys:
        ours, theirs = _unique(left, key), _unique(right, key)
        for common in ours.keys() & theirs.keys():
            first, second = ours[common], theirs[common]
            pairs.append(Pair(second, reference / first, target / second))
            left.remove(first)
            right.remove(second)
    if not pairs:
        raise UserError(
            f"{reference} ({len(left)} videos) and {target} ({len(right)} videos) have no name in "
            "common; name the scored videos like their references"
            + ("." if recursive else ", or add --recursive to look in subfolders.")
        )
    return Pairs(sorted(pairs, key=lambda pair: pair.name), sorted(left), sorted(right))


def _names(root: Path, recursive: bool, other: Path) -> set[str]:
    """Videos of a folder, relative to it; the other folder may lie below it."""
    if not root.is_dir():
        raise UserError(f"the video folder {root} does not exist; name a folder with videos.")
    if recursive:
        found = find_files(root, VIDEO_EXTENSIONS, other)
    else:
        found = [path for path in root.iterdir() if path.suffix.lower() in VIDEO_EXTENSIONS]
    visible = (path for path in found if not path.name.startswith("."))
    return {path.relative_to(root).as_posix() for path in visible}


def _unique(names: set[str], key: Callable[[str], str]) -> dict[str, str]:
    counts = Counter(map(key, names))
    return {key(name): name for name in names if counts[key(name)] == 1}


@dataclass(frozen=True)
class Window:
    """Which frames of a pair are compared, and how large.

    Attributes:
        num_frames: of each video, the left-out ones counted in.
        skip: first frames that are left out.
        height: pixels of the compared frames.
        width: likewise.
    """

    num_frames: int
    skip: int
    height: int
    width: int


def window_of(
    pair: Pair, width: int | None, num_frames: int | None, skip: int
) -> Window | UserError:
    """The part of a pair that can be compared.

    Args:
        pair: the two videos.
        width: of the short side; None leaves the frames as they are.
        num_frames: at most; None takes all.
        skip: first frames to leave out.

    Returns:
        A ``VideoError`` where one of them cannot be read, a plain ``UserError`` where they do not
        go together.
    """
    try:
        reference, target = probe(pair.reference), probe(pair.target)
    except VideoError as error:
        return error
    lengths = [min(info.num_frames, num_frames or info.num_frames) for info in (reference, target)]
    if lengths[0] != lengths[1]:
        fix = "a smaller --num_frames" if num_frames else "--num_frames"
        return UserError(
            f"{pair.name} has {target.num_frames} frames and its reference {reference.num_frames}; "
            f"compare the first of both with {fix}."
        )
    if skip >= lengths[0]:
        return UserError(f"--skip_frames {skip} leaves nothing of {pair.name}: skip fewer.")
    if width is not None:
        return Window(lengths[0], skip, *_resized(target, width))
    if (reference.height, reference.width) != (target.height, target.width):
        return UserError(
            f"{pair.name} has {target.width}x{target.height} pixels and its reference "
            f"{reference.width}x{reference.height}; bring both to one size with --width."
        )
    return Window(lengths[0], skip, target.height, target.width)


def _resized(info: VideoInfo, short_side: int) -> tuple[int, int]:
    scale = short_side / min(info.height, info.width)
    return round(info.height * scale), round(info.width * scale)


def iter_pair(pair: Pair, window: Window) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yields the frames to compare, reference and target, each (H, W, 3) uint8.

    Both are scaled so that they cover the window's size, and centre-cropped to it.

    Raises:
        VideoError: one of them cannot be decoded, or ends early.
    """
    wanted = range(window.skip, window.num_frames)
    readers = [_frames(path, wanted, window) for path in (pair.reference, pair.target)]
    for number in wanted:
        frames = [next(reader, None) for reader in readers]
        for path, frame in zip((pair.reference, pair.target), frames, strict=True):
            if frame is None:
                raise VideoError(f"{path} ends after {number} of its {window.num_frames} frames.")
        assert frames[0] is not None and frames[1] is not None
        yield frames[0], frames[1]


def _frames(path: Path, wanted: Sequence[int], window: Window) -> Iterator[NDArray[np.uint8]]:
    fit = Fit(window.height, window.width, is_fine=False)
    for _, pixels in chosen().iter_pixels(path, wanted, fit):
        yield pixels
