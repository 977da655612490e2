"""Frames to an mp4 that plays everywhere.

Flows in: ``(3, T, H, W) uint8``, torch's or numpy's, and a frame rate. Flows out: H.264, yuv420p,
BT.709 limited range, written under a temporary name and renamed, so that a killed run leaves no
half file. torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.errors import UserError, VideoError
from cosmos_posttrain.files import replacing, sync
from cosmos_posttrain.video.pixels import SCALER_FLAGS

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_CRF = "17"
_BT709 = 1


def _check(path: Path, frames: torch.Tensor | NDArray[np.uint8], fps: float) -> None:
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
    frames: torch.Tensor | NDArray[np.uint8],
    fps: float,
    before_naming: Callable[[], None] | None = None,
) -> None:
    """Writes an mp4 atomically.

    Args:
        path: the file, with or without ``.mp4``'s extension; its folder is made if missing.
        frames: (3, T, H, W) uint8 RGB, H and W even; a tensor or an array.
        fps: frames a second; 29.97 and the like become the exact fraction (30000/1001).
        before_naming: called when the clip is safely on disk, before it gets its name.

    Raises:
        VideoError: a shape, dtype, size or rate that H.264 cannot hold.
        UserError: the folder cannot be made or written to.
    """
    path = Path(path)
    _check(path, frames, fps)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            _encode(temporary, frames, fps)
            if before_naming is not None:
                sync(temporary)
                before_naming()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error


def _encode(path: Path, frames: torch.Tensor | NDArray[np.uint8], fps: float) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    reformatter = VideoReformatter()
    array = frames if isinstance(frames, np.ndarray) else frames.detach().cpu().numpy()
    pixels = np.ascontiguousarray(array.transpose(1, 2, 3, 0))
    options = {"movflags": "+faststart"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree depends on thread timing; without it the same frames give the same
        # bytes.
        stream.options = {"crf": _CRF, "preset": "medium", "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        for image in pixels:
            frame = reformatter.reformat(
                av.VideoFrame.from_ndarray(image, format="rgb24"),
                format="yuv420p",
                interpolation=SCALER_FLAGS,
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                dst_colorspace=Colorspace.ITU709,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
