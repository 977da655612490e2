"""Frames to an mp4 that plays everywhere.

Flows in: ``(3, T, H, W) uint8``, torch's or numpy's, whole or part by part, and a frame rate. Flows
out: H.264, yuv420p, BT.709 limited range, written under a temporary name and renamed, so that a
killed run leaves no half file. torch is not imported here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from cosmos_posttrain.errors import UserError, VideoError
from cosmos_posttrain.files import replacing, sync
from cosmos_posttrain.video.backend import EncodingError
from cosmos_posttrain.video.choice import chosen

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    Frames = torch.Tensor | NDArray[np.uint8]


def _check(path: Path, frames: Frames, fps: float) -> None:
    dtype = str(frames.dtype).removeprefix("torch.")
    if frames.ndim != 4 or frames.shape[0] != 3 or dtype != "uint8":
        raise VideoError(
            f"cannot write {path}: frames are {tuple(frames.shape)} {frames.dtype}; "
            "they must be (3, T, H, W) uint8."
        )
    num_frames, height, width = frames.shape[1:]
    if num_frames < 1 or height < 2 or width < 2 or height % 2 or width % 2:
        raise VideoError(
            f"cannot write {path}: {num_frames} frames of {width}x{height}; H.264 with yuv420p "
            "needs at least one frame and an even width and height."
        )
    if not 0 < fps < 1000:
        raise VideoError(f"cannot write {path}: {fps} frames a second is not in (0, 1000).")


def write_mp4(
    path: str | Path,
    frames: Frames | Iterable[Frames],
    fps: float,
    before_naming: Callable[[], None] | None = None,
) -> None:
    """Writes an mp4 atomically.

    Args:
        path: the file, with or without ``.mp4``'s extension; its folder is made if missing.
        frames: (3, T, H, W) uint8 RGB, H and W even; a tensor or an array, or several of them, one
            behind the other, of which only one is held at a time.
        fps: frames a second; 29.97 and the like become the exact fraction (30000/1001).
        before_naming: called when the clip is safely on disk, before it gets its name.

    Raises:
        VideoError: a shape, dtype, size or rate that H.264 cannot hold, or no H.264 encoder here.
        UserError: the folder cannot be made or written to, or nothing here writes video.
    """
    path = Path(path)
    parts: Iterator[Frames]
    if hasattr(frames, "ndim"):
        parts = iter([cast("Frames", frames)])
    else:
        parts = iter(cast("Iterable[Frames]", frames))
    first = next(parts, np.empty((3, 0, 0, 0), np.uint8))
    _check(path, first, fps)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            images = (image for part in itertools.chain([first], parts) for image in _images(part))
            _encode(path, temporary, images, fps)
            if before_naming is not None:
                sync(temporary)
                before_naming()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error


def _encode(path: Path, temporary: Path, images: Iterator[NDArray[np.uint8]], fps: float) -> None:
    """Names the user's file where it cannot be written."""
    backend = chosen()
    try:
        backend.encode(temporary, images, fps)
    except EncodingError as error:
        raise VideoError(f"{path} cannot be written by {backend.label()}: {error}.") from error


def _images(part: Frames) -> Iterable[NDArray[np.uint8]]:
    """(T, H, W, 3), contiguous."""
    array = part if isinstance(part, np.ndarray) else part.detach().cpu().numpy()
    return np.ascontiguousarray(array.transpose(1, 2, 3, 0))
