"""Video by PyAV: a ``VideoBackend``.

Flows in: paths and frame numbers; images. Flows out: fitted frames (``decode.py`` finds and decodes
them, ``pixels.py`` fits them); H.264 in an mp4.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.video import decode
from cosmos_posttrain.video.backend import EncodingError, Fit, VideoHeader, VideoInfo
from cosmos_posttrain.video.pixels import BICUBIC, SCALER_FLAGS, FrameFitter
from cosmos_posttrain.video.streams import frame_rate, open_video, pixel_aspect

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CRF = "17"
_BT709 = 1


def label() -> str:
    """``pyav 16.1.0 (FFmpeg 8.0)``."""
    import av

    return f"pyav {av.__version__} (FFmpeg {av.ffmpeg_version_info})"


def read_header(path: str | Path) -> VideoHeader:
    """Size, rate and length as the file says them."""
    with open_video(path) as (container, stream):
        context = stream.codec_context
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        seconds = seconds or (container.duration or 0) / 1e6
        return VideoHeader(context.height, context.width, frame_rate(stream), seconds)


def probe(path: str | Path) -> VideoInfo:
    """What a player would say; see ``decode.probe``."""
    return decode.probe(path)


def iter_pixels(
    path: str | Path, wanted: Sequence[int], fit: Fit
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Number and pixels of the wanted frames."""
    with open_video(path) as (_, stream):
        aspect = pixel_aspect(stream)
    fitter = FrameFitter(fit.height, fit.width, aspect, SCALER_FLAGS if fit.is_fine else BICUBIC)
    for number, frame in decode.iter_frames(path, wanted):
        if fit.check is not None:
            fit.check(frame.width, frame.height)
        yield number, fitter(frame)


def check_encoder() -> None:
    """FFmpeg may have been built without x264."""
    import av

    try:
        av.Codec("libx264", "w")
    except ValueError as error:  # av's UnknownCodecError
        raise EncodingError(
            "its FFmpeg is built without libx264; pip install av has one that is not"
        ) from error


def encode(path: Path, images: Iterator[NDArray[np.uint8]], fps: float) -> None:
    """H.264, yuv420p, BT.709 in limited range; the same images give the same bytes."""
    import av
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    reformatter = VideoReformatter()
    first = next(images)
    options = {"movflags": "+faststart"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = first.shape[:2]
        stream.pix_fmt = "yuv420p"
        # x264's macroblock tree depends on thread timing; without it the same frames give the same
        # bytes.
        stream.options = {"crf": _CRF, "preset": "medium", "x264-params": "mbtree=0"}
        context = stream.codec_context
        context.color_range = ColorRange.MPEG
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        for image in itertools.chain([first], images):
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
