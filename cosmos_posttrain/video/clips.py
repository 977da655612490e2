"""Clips: a given number of frames of a given size, cut out of a video.

Flows in: a path, first frames, a stride, and the size in frames and pixels. Flows out: ``Clip``
with frames as ``(3, T, H, W) uint8``; it stays uint8 until the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.errors import VideoError
from cosmos_posttrain.video.backend import Fit, VideoInfo
from cosmos_posttrain.video.choice import chosen
from cosmos_posttrain.video.files import is_image

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray


# Of what generation starts from: more shows nothing but blur.
MAX_ENLARGEMENT = 16


@dataclass(frozen=True)
class Clip:
    """Frames of one clip and where they came from.

    Attributes:
        frames: (3, T, H, W) uint8 RGB.
        start_frame: number of the first frame in the video.
        stride: distance between neighbouring frames, in frames of the video.
        num_repeated: how many frames at the end repeat the last one, because the video ended.
        fps: the video's frames a second (of the video, not of the clip); 0.0 for a still image.
    """

    frames: torch.Tensor
    start_frame: int
    stride: int
    num_repeated: int
    fps: float


def _to_clip(
    frames: list[NDArray[np.uint8]], num_frames: int, start: int, stride: int, fps: float
) -> Clip:
    import torch

    num_repeated = num_frames - len(frames)
    stacked = np.stack(frames + frames[-1:] * num_repeated)
    tensor = torch.from_numpy(stacked).permute(3, 0, 1, 2).contiguous()
    return Clip(tensor, start, stride, num_repeated, fps)


def probe(path: str | Path) -> VideoInfo:
    """Size, rate and length of a video; decodes one frame, which proves that it can be decoded.

    The number of frames is the container's own where that is exact (mp4, mov), else counted from
    the packets.

    Raises:
        VideoError: the file cannot be opened or its first frame cannot be decoded.
    """
    return chosen().probe(path)


def iter_clips(
    path: str | Path,
    starts: Sequence[int],
    num_frames: int,
    height: int,
    width: int,
    stride: int = 1,
) -> Iterator[Clip]:
    """Yields clips in ascending order of their first frame, in one pass over the file.

    Only the frames of clips that are still open are held in memory. The arguments are those of
    ``read_clips``.

    Raises:
        VideoError: the file cannot be decoded, or a clip starts past its end.
    """
    if num_frames < 1 or stride < 1 or height < 1 or width < 1 or min(starts, default=0) < 0:
        raise VideoError(
            f"cannot cut {num_frames} frames of {width}x{height} with stride {stride} from frame "
            f"{min(starts, default=0)}; sizes and stride must be at least 1, starts at least 0."
        )
    if not starts:
        return
    fps = chosen().read_header(path).fps
    ordered = sorted(set(starts))
    span = [offset * stride for offset in range(num_frames)]
    wanted = sorted({start + offset for start in ordered for offset in span})
    source = chosen().iter_pixels(path, wanted, Fit(height, width))
    buffer: dict[int, NDArray[np.uint8]] = {}
    for position, start in enumerate(ordered):
        needed = [start + offset for offset in span]
        while needed[-1] not in buffer:
            number, pixels = next(source, (-1, None))
            if pixels is None:
                break
            buffer[number] = pixels
        present = [buffer[number] for number in needed if number in buffer]
        if not present:
            raise VideoError(f"{path} ends before frame {start}, where a clip should start.")
        yield _to_clip(present, num_frames, start, stride, fps)
        following = ordered[position + 1] if position + 1 < len(ordered) else None
        if following is not None:
            buffer = {number: image for number, image in buffer.items() if number >= following}


def read_clips(
    path: str | Path,
    starts: Sequence[int],
    num_frames: int,
    height: int,
    width: int,
    stride: int = 1,
) -> list[Clip]:
    """Reads clips in one pass, decoding only what they need.

    Args:
        path: a video in any format that FFmpeg reads.
        starts: number of each clip's first frame, in presentation order; any order, may overlap.
        num_frames: frames of each clip; a video that ends earlier repeats its last frame.
        height: pixels, after an aspect-preserving resize and a centre crop.
        width: pixels, likewise.
        stride: distance between a clip's frames, in frames of the video.

    Returns:
        One clip for each start, in the order of ``starts``.

    Raises:
        VideoError: the file cannot be decoded, or a clip starts past its end.
    """
    clips = {
        clip.start_frame: clip
        for clip in iter_clips(path, starts, num_frames, height, width, stride)
    }
    return [clips[start] for start in starts]


def read_image(path: str | Path, height: int, width: int) -> torch.Tensor:
    """Reads a still image (or a video's first frame), resized and centre-cropped.

    Returns:
        (3, 1, H, W) uint8 RGB.

    Raises:
        VideoError: the file cannot be decoded.
    """
    return read_clips(path, [0], 1, height, width)[0].frames


def read_input(path: str | Path, num_frames: int, height: int, width: int) -> Clip:
    """Reads what generation starts from: an image, or a video's first ``num_frames`` frames.

    An image gives one frame, whatever ``num_frames`` says; a video that is shorter repeats its
    last frame and says so in ``num_repeated``.

    Raises:
        VideoError: the file cannot be decoded, is far too small, or is a still where a video is
            asked for: repeated, it would say that nothing moves.
    """
    info = probe(path)
    least = (-(-height // MAX_ENLARGEMENT), -(-width // MAX_ENLARGEMENT))
    if info.height < least[0] or info.width < least[1]:
        raise VideoError(
            f"{path} has {info.width}x{info.height} pixels, too few for a clip of "
            f"{width}x{height}; give at least {least[1]}x{least[0]}."
        )
    if is_image(path):
        return Clip(read_image(path, height, width), 0, 1, 0, 0.0)
    clip = read_clips(path, [0], num_frames, height, width)[0]
    if num_frames > 1 and clip.num_repeated == num_frames - 1:
        raise VideoError(
            f"{path} has 1 frame and {num_frames} are to be given; give a longer video, or 1 frame "
            "with --num_input_frames 1."
        )
    return clip
