"""Small videos for tests: frame k is a flat grey whose level says k."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

BASE, STEP = 20, 3

B_FRAMES = {"g": "12", "bf": "3", "b_strategy": "0", "sc_threshold": "0"}
# File name, codec, pixel format and the encoder's options.
FORMATS = [
    ("h264-b.mp4", "libx264", "yuv420p", B_FRAMES),
    ("h264-open-gop.mp4", "libx264", "yuv420p", {**B_FRAMES, "x264-params": "open-gop=1"}),
    ("h264-intra-refresh.mp4", "libx264", "yuv420p", {"g": "12", "intra-refresh": "1"}),
    ("h264-444.mkv", "libx264", "yuv444p", B_FRAMES),
    ("h264-10bit.mp4", "libx264", "yuv420p10le", B_FRAMES),
    ("h264.ts", "libx264", "yuv420p", B_FRAMES),
    ("h264-fragmented.mp4", "libx264", "yuv420p", B_FRAMES),
    ("hevc.mp4", "libx265", "yuv420p", {"x265-params": "keyint=12:bframes=3:log-level=none"}),
    (
        "vp8.webm",
        "libvpx",
        "yuv420p",
        {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "crf": "4", "b": "4M"},
    ),
    (
        "vp9.webm",
        "libvpx-vp9",
        "yuv420p",
        {"g": "12", "auto-alt-ref": "1", "cpu-used": "8", "crf": "4", "b": "4M"},
    ),
    ("mpeg4.avi", "mpeg4", "yuv420p", {"g": "12", "bf": "2", "b": "4M"}),
    ("mpeg2.mpg", "mpeg2video", "yuv422p", {"g": "12", "bf": "2", "b": "8M"}),
    ("mjpeg.mov", "mjpeg", "yuvj422p", {}),
    ("prores.mov", "prores_ks", "yuv422p10le", {}),
    ("ffv1.mkv", "ffv1", "bgr0", {}),
]


def level(index: int) -> int:
    """Grey level of frame ``index``; steps of 3 survive lossy codecs."""
    return BASE + STEP * (index % 70)


def frame_numbers(frames) -> list[int]:
    """Which frames a (3, T, H, W) uint8 clip holds, read from its grey levels."""
    levels = frames.float().mean(dim=(0, 2, 3))
    return [round((float(value) - BASE) / STEP) for value in levels]


def grey_frames(num_frames: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    return [np.full((height, width, 3), level(k), np.uint8) for k in range(num_frames)]


def write_video(
    path: Path,
    images: Sequence[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: int = 10,
    options: dict[str, str] | None = None,
    pts: Sequence[int] | None = None,
    sample_aspect_ratio: Fraction | None = None,
) -> Path:
    """Encodes (H, W, 3) uint8 images; ``pts`` in milliseconds makes the frame rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.options = options or {}
        if sample_aspect_ratio is not None:
            stream.codec_context.sample_aspect_ratio = sample_aspect_ratio
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_streams(
    path: Path,
    streams: Sequence[tuple[list[np.ndarray], Disposition]],
    codec: str = "libx264",
    cover: np.ndarray | None = None,
) -> Path:
    """One file with several video streams, each with its images and flags, and a cover picture."""
    with av.open(str(path), "w") as container:
        added = []
        if cover is not None:
            added.append((container.add_stream("png", rate=1), [cover], Disposition.attached_pic))
        for images, flags in streams:
            added.append((container.add_stream(codec, rate=10), images, flags))
        for stream, images, flags in added:
            stream.height, stream.width = images[0].shape[:2]
            stream.pix_fmt = "rgb24" if flags == Disposition.attached_pic else "yuv420p"
            stream.disposition = flags.value
        for stream, images, _ in added:
            for number, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def disable_tracks(path: Path) -> Path:
    """Clears the flag of an mp4's tracks that makes them count as default."""
    data = bytearray(path.read_bytes())
    offset = data.find(b"tkhd")
    while offset >= 0:
        data[offset + 7] &= 0xFE
        offset = data.find(b"tkhd", offset + 4)
    path.write_bytes(data)
    return path


def write_audio(path: Path) -> Path:
    """An mp4 that holds sound and no picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        samples = np.zeros((1, 4096), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# Upright image = the stored one under x' = a x + c y, y' = b x + d y (y down).
ROTATE_90 = (0, 1, -1, 0)  # clockwise, as a phone held upright
ROTATE_180 = (-1, 0, 0, -1)
ROTATE_270 = (0, -1, 1, 0)


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Writes (a, b, c, d) into an mp4's track header."""
    data = bytearray(path.read_bytes())
    offset = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, offset, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
