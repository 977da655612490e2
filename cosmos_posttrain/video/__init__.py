"""Video files in, uint8 frames out, and back.

Flows in: paths of videos or images in any format that FFmpeg reads. Flows out: clips of exactly the
frames asked for as ``(3, T, H, W) uint8``, resized and centre-cropped, and H.264 mp4 files.
"""

from __future__ import annotations

from cosmos_posttrain.errors import VideoError
from cosmos_posttrain.video.backend import VideoInfo
from cosmos_posttrain.video.choice import check_writing, decoder_label, decoder_name
from cosmos_posttrain.video.clips import (
    Clip,
    iter_clips,
    probe,
    read_clips,
    read_image,
    read_input,
)
from cosmos_posttrain.video.files import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    is_image,
    list_videos,
)
from cosmos_posttrain.video.pixels import to_float, to_uint8
from cosmos_posttrain.video.write import write_mp4

__all__ = [
    "IMAGE_EXTENSIONS",
    "VIDEO_EXTENSIONS",
    "Clip",
    "VideoError",
    "VideoInfo",
    "check_writing",
    "decoder_label",
    "decoder_name",
    "is_image",
    "iter_clips",
    "list_videos",
    "probe",
    "read_clips",
    "read_image",
    "read_input",
    "to_float",
    "to_uint8",
    "write_mp4",
]
