"""One decoded frame to pixels of the wanted size, and uint8 to the tokenizer's range and back.

Flows in: an FFmpeg frame in any pixel format, with its display matrix and sample aspect ratio.
Flows out: ``(H, W, 3) uint8`` RGB, upright, resized with its aspect kept and centre-cropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av
    import torch
    from numpy.typing import NDArray

BICUBIC = 0x4  # FFmpeg's swscale by default
# Without the last four, white comes out as 253 and results differ between kinds of CPU. (bicubic,
# full chroma both ways, accurate rounding, bit exact)
SCALER_FLAGS = 0x4 | 0x2000 | 0x4000 | 0x40000 | 0x80000
_BT709, _BT601 = 1, 5  # swscale's colour matrices
_LIMITED, _FULL = 1, 2  # colour ranges: 16-235 and 0-255


def to_float(frames: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1], any shape."""
    return frames.float().div_(127.5).sub_(1.0)


def to_uint8(video: torch.Tensor) -> torch.Tensor:
    """Float in [-1, 1] (clamped) to uint8 in [0, 255], rounded to nearest, any shape."""
    import torch

    scaled = video.float().clamp(-1.0, 1.0).add(1.0).mul_(127.5)
    return scaled.round_().to(torch.uint8)


def orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How to put a frame upright: (transpose, then flip columns, then flip rows).

    Phones write a rotation into a display matrix; angles that are not multiples of 90 degrees are
    rounded to the nearest. Mirror images are not undone: only the matrix itself tells them from
    rotations, and PyAV 16 crashes the process on reading a frame's side data where an ICC profile
    lies beside it, as it does in many PNG and JPEG files.
    """
    quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise
    return {
        0: (False, False, False),
        1: (True, False, True),
        2: (False, True, True),
        3: (True, True, False),
    }[quarter_turns]


def _color_range(frame: av.VideoFrame) -> int:
    name = frame.format.name
    is_full = frame.color_range == _FULL or name.startswith("yuvj")
    if frame.color_range not in (_LIMITED, _FULL) and name.startswith("gray"):  # of JPEG files
        is_full = True
    return _FULL if is_full else _LIMITED


def _colours(frame: av.VideoFrame) -> dict[str, int]:
    """What the scaler is told of a frame's colours."""
    if frame.format.is_rgb:
        return {}  # scaling goes through YUV: a matrix on one side alone would change the colours
    # RGB has no matrix, but PyAV sets up the source's only where the two differ.
    return {
        "dst_colorspace": _BT601 if frame.colorspace == _BT709 else _BT709,
        "src_color_range": _color_range(frame),
        "dst_color_range": _FULL,
    }


def display_size(frame: av.VideoFrame, pixel_aspect: float) -> tuple[int, int]:
    """Height and width as a player shows the frame: square pixels, upright."""
    height, width = frame.height, max(1, round(frame.width * pixel_aspect))
    return (width, height) if orientation(frame)[0] else (height, width)


class FrameFitter:
    """Turns frames into ``(height, width, 3) uint8``: resize so that both sides cover, then crop.

    Scaling is bicubic by FFmpeg's swscale, whose filter widens when it shrinks (no aliasing). One
    instance keeps the scaler between frames; it belongs to one thread. ``flags`` are swscale's.
    """

    def __init__(
        self, height: int, width: int, pixel_aspect: float = 1.0, flags: int = SCALER_FLAGS
    ) -> None:
        from av.video.reformatter import VideoReformatter

        self._flags = flags
        self._size = (height, width)
        self._pixel_aspect = pixel_aspect
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """Fits one frame; returns a fresh contiguous array (height, width, 3) uint8 RGB."""
        height, width = self._size
        transpose, flip_columns, flip_rows = orientation(frame)
        shown_height, shown_width = display_size(frame, self._pixel_aspect)
        scale = max(height / shown_height, width / shown_width)
        cover_height = max(height, round(shown_height * scale))
        cover_width = max(width, round(shown_width * scale))
        coded = (cover_width, cover_height) if transpose else (cover_height, cover_width)
        rgb = self._reformatter.reformat(
            frame,
            width=coded[1],
            height=coded[0],
            format="rgb24",
            interpolation=self._flags,
            **_colours(frame),
        )
        pixels = rgb.to_ndarray()
        if transpose:
            pixels = pixels.transpose(1, 0, 2)
        pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        top, left = (cover_height - height) // 2, (cover_width - width) // 2
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])
