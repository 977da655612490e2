"""Opening a media file and choosing the video stream that is read.

Flows in: a path. Flows out: an open container with its best video stream, or one sentence that says
why there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.errors import VideoError
from cosmos_posttrain.video.files import check_whole, is_image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file and picks the video stream that FFmpeg calls the best.

    Raises:
        VideoError: one sentence on what is wrong with the file.
    """
    import av

    path = Path(path)
    check_whole(path)
    # Only local files: a media file must not make FFmpeg fetch another one.
    options = {"protocol_whitelist": "file"}
    if is_image(path):
        options["pattern_type"] = "none"
    try:
        # Not ``options=``: PyAV sizes those by the streams known before FFmpeg finds the rest, and
        # crashes on an MPEG program stream.
        container = av.open(
            str(path.absolute()), container_options=options, metadata_errors="replace"
        )
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"{path} cannot be opened as video: {error_text(error)}.") from error
    with container:
        stream = _best_stream(path, container)
        # One thread a video: results do not depend on timing, and files are read in parallel.
        stream.thread_count = 1
        yield container, stream


def _best_stream(path: Path, container: InputContainer) -> VideoStream:
    """The choice of ``av_find_best_stream`` among streams that are not cover pictures.

    FFmpeg prefers streams flagged as default and not made for the impaired, then those with more
    frames at the file's start, then the higher bit rate, then the first.
    """
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams})
        raise VideoError(f"{path} has no video stream (only {', '.join(kinds) or 'nothing'}).")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise VideoError(f"{path} has a video stream of a codec that FFmpeg does not know.")
    best = container.streams.best("video")
    for stream in known:
        if best is not None and stream.index == best.index:
            return stream

    def rank(stream: VideoStream) -> tuple[int, int]:
        is_default = bool(stream.disposition & Disposition.default)
        is_for_impaired = bool(
            stream.disposition & (Disposition.hearing_impaired | Disposition.visual_impaired)
        )
        return is_default - is_for_impaired, stream.bit_rate or 0

    # The best is a cover or unknown: FFmpeg's rules again, but for the frames, which it keeps.
    return max(known, key=rank)


def error_text(error: BaseException) -> str:
    """What FFmpeg or the system says, fit for the middle of a sentence."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).strip().rstrip(".").lower()


def pixel_aspect(stream: VideoStream) -> float:
    """Width of a pixel over its height; 1.0 where the file does not say."""
    return float(stream.sample_aspect_ratio or 1) or 1.0


def frame_rate(stream: VideoStream) -> float:
    """Average frames a second; 0.0 where the file does not say."""
    return float(stream.average_rate or stream.guessed_rate or 0)
