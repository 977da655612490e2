"""Video by torchcodec, where PyAV cannot be installed: a ``VideoBackend``.

Flows in: paths and frame numbers; images. Flows out: fitted frames; H.264 in an mp4.

Frames are counted while they are decoded, from the start of the file: torchcodec's own look-up by
number gives wrong frames where a container's index does not tell the truth (ts, avi) and after a
seek in video without keyframes. RGB is as FFmpeg makes it by default (nearest chroma, rounding
downwards), so frames are near PyAV's and not the same: docs/data.md has the measured differences.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from cosmos_posttrain.errors import VideoError
from cosmos_posttrain.video.backend import EncodingError, Fit, VideoHeader, VideoInfo
from cosmos_posttrain.video.files import check_whole, is_image

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

# What torchcodec raises for a file, whatever is wrong with it.
_ERRORS = (RuntimeError, ValueError, IndexError, OSError, AssertionError)
# Cover pictures of sound files; to FFmpeg they are streams of video.
_PICTURE_CODECS = frozenset("png mjpeg bmp gif webp tiff".split())
_NO_SEEKING = "could not seek file"  # what listing the frames of a cover picture ends with
_ORIENTATION = 0x0112  # EXIF's tag
_CRF = 17


def label() -> str:
    """``torchcodec 0.13.0 (FFmpeg 5)``."""
    import torchcodec

    return f"torchcodec {torchcodec.__version__} (FFmpeg {torchcodec.ffmpeg_major_version})"


def _open(path: str | Path, is_exact: bool = False) -> Any:
    """A ``torchcodec.decoders.VideoDecoder``; an exact one has listed the file's frames.

    Raises:
        VideoError: one sentence on what is wrong with the file.
    """
    from torchcodec.decoders import VideoDecoder

    path = Path(path)
    check_whole(path)
    # FFmpeg takes %d in an image's path for a pattern; bytes have no path.
    source = path.read_bytes() if is_image(path) else str(path.absolute())
    try:
        # One thread a video: results do not depend on timing, and files are read in parallel.
        decoder = VideoDecoder(
            source,
            dimension_order="NHWC",
            num_ffmpeg_threads=1,
            device="cpu",
            seek_mode="exact" if is_exact else "approximate",
        )
    except _ERRORS as error:
        if not is_exact:  # the header alone may say too little
            return _open(path, is_exact=True)
        text = error_text(error)
        if (
            "no valid stream" in text
            or "best video stream is unknown" in text
            or _NO_SEEKING in text
        ):
            raise VideoError(f"{path} has no video stream.") from error
        raise VideoError(f"{path} cannot be opened as video: {text}.") from error
    if not (is_exact or is_image(path)) and decoder.metadata.codec in _PICTURE_CODECS:
        return _open(path, is_exact=True)
    return decoder


def error_text(error: BaseException) -> str:
    """What FFmpeg says, fit for the middle of a sentence, without torchcodec's file and line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = line.split(".cpp:", 1)[-1].split(", ", 1)[-1]
    for known in ("Invalid data found when processing input", "No such file or directory"):
        if known in said:
            return known.lower()
    return said.strip().rstrip(".").lower()


def _fps(metadata: Any) -> float:
    return float(metadata.average_fps_from_header or metadata.average_fps or 0)


def _seconds(metadata: Any) -> float:
    return float(metadata.duration_seconds_from_header or metadata.duration_seconds or 0)


def _shown_size(frame: torch.Tensor, metadata: Any) -> tuple[int, int]:
    """Height and width with square pixels of an upright frame (H, W, 3)."""
    height, width = frame.shape[:2]
    aspect = float(metadata.pixel_aspect_ratio or 1) or 1.0
    if round(float(metadata.rotation or 0) / 90) % 2:  # the aspect is that of the stored pixels
        return max(1, round(height * aspect)), width
    return height, max(1, round(width * aspect))


def read_header(path: str | Path) -> VideoHeader:
    """Size, rate and length as the file says them; the size is upright already."""
    metadata = _open(path).metadata
    return VideoHeader(metadata.height, metadata.width, _fps(metadata), _seconds(metadata))


def probe(path: str | Path) -> VideoInfo:
    """What a player would say."""
    path = Path(path)
    decoder = _open(path, is_exact=True)
    metadata, fps = decoder.metadata, _fps(decoder.metadata)
    first = next(_decoded(decoder, path), None)
    if first is None:
        raise VideoError(f"{path} has no frame that can be decoded.")
    height, width = _shown_size(first, metadata)
    num_frames = len(decoder)
    seconds = _seconds(metadata) or (num_frames / fps if fps else 0.0)
    return VideoInfo(num_frames, fps, height, width, seconds)


def _decoded(decoder: Any, path: Path) -> Iterator[torch.Tensor]:
    """Every frame from the first on, (H, W, 3) uint8 RGB, upright."""
    import torch
    from torchcodec import _core  # there is no public way that does not seek

    turns = _exif_turns(path) if is_image(path) and not decoder.metadata.rotation else 0
    for number in itertools.count():
        try:
            yield torch.rot90(_core.get_next_frame(decoder._decoder)[0], turns)
        except IndexError:  # the end
            return
        except _ERRORS as error:
            raise VideoError(
                f"{path} cannot be decoded after frame {number}: {error_text(error)}."
            ) from error


def _exif_turns(path: Path) -> int:
    """Quarter turns, counterclockwise, that put a photo upright; FFmpeg reads them from 8 on."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError):
        return 0
    return {3: 2, 6: 3, 8: 1}.get(orientation, 0)


def iter_pixels(
    path: str | Path, wanted: Sequence[int], fit: Fit
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Number and pixels of the wanted frames; colours are never finer than FFmpeg's default."""
    path = Path(path)
    decoder = _open(path)
    left = iter(wanted)
    following = next(left, None)
    for number, frame in enumerate(_decoded(decoder, path)):
        if number == following:
            if fit.check is not None:
                fit.check(frame.shape[1], frame.shape[0])
            yield number, fitted(frame, _shown_size(frame, decoder.metadata), fit)
            following = next(left, None)
            if following is None:
                return
        elif number == 0 and following is None:
            return


def fitted(frame: torch.Tensor, shown: tuple[int, int], fit: Fit) -> NDArray[np.uint8]:
    """Scales so that both sides cover, and crops; bicubic, with a filter that widens to shrink.

    Args:
        frame: (H, W, 3) uint8 RGB, upright.
        shown: height and width with square pixels.
        fit: the size of the result.

    Returns:
        A fresh contiguous array (fit.height, fit.width, 3) uint8.
    """
    from torch.nn import functional

    scale = max(fit.height / shown[0], fit.width / shown[1])
    cover = max(fit.height, round(shown[0] * scale)), max(fit.width, round(shown[1] * scale))
    if cover != tuple(frame.shape[:2]):
        images = frame.permute(2, 0, 1)[None]
        scaled = functional.interpolate(images, cover, mode="bicubic", antialias=True)
        frame = scaled[0].permute(1, 2, 0)
    top, left = (cover[0] - fit.height) // 2, (cover[1] - fit.width) // 2
    cut = frame[top : top + fit.height, left : left + fit.width]
    return np.array(cut.numpy(), order="C")


def encode(path: Path, images: Iterator[NDArray[np.uint8]], fps: float) -> None:
    """H.264, yuv420p, with the x264 of FFmpeg's libraries.

    Raises:
        EncodingError: torchcodec is older than 0.13, or FFmpeg's libraries are without x264.
    """
    with path.open("wb") as file:
        _encode(file, images, fps)


def check_encoder() -> None:
    """Encodes one frame into memory: FFmpeg says only then what it lacks."""
    _encode(io.BytesIO(), iter([np.zeros((16, 16, 3), np.uint8)]), 25)


def _encode(file: BinaryIO, images: Iterator[NDArray[np.uint8]], fps: float) -> None:
    import torch
    from torchcodec import encoders

    if not hasattr(encoders, "Encoder"):
        raise EncodingError("install torchcodec 0.13 or newer, or PyAV (pip install av)")
    first = next(images)
    encoder = encoders.Encoder()
    with _refusals():
        stream = encoder.add_video(
            height=first.shape[0],
            width=first.shape[1],
            frame_rate=float(Fraction(fps).limit_denominator(1001)),
            device="cpu",
            codec="libx264",
            pixel_format="yuv420p",
            crf=_CRF,
            preset="medium",
            extra_options={"x264-params": "mbtree=0"},
        )
        encoder.open_file_like(file, format="mp4")
    try:
        for image in itertools.chain([first], images):
            with _refusals():
                stream.add_frames(torch.from_numpy(image).permute(2, 0, 1)[None])
    except BaseException:
        with contextlib.suppress(RuntimeError):  # what ended it says more than what is missing now
            encoder.close()
        raise
    with _refusals():
        encoder.close()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What torchcodec raises, and nothing of where the images come from."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise EncodingError(
            f"{error_text(error)}; PyAV (pip install av) brings its own H.264 encoder"
        ) from error
