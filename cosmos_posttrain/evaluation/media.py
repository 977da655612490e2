"""Which files are evaluated, and the clip that is taken of each.

Flows in: a folder of videos and images. Flows out: one clip of each as (3, T, H, W) uint8 that the
tokenizer can represent.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.errors import UserError, VideoError
from cosmos_posttrain.evaluation.config.tokenizer import DEFAULT_NUM_FRAMES, TokenizerEvalConfig
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.prepare.sources import VideoSource
from cosmos_posttrain.video import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    is_image,
    probe,
    read_clips,
)
from cosmos_posttrain.video.files import find_files

if TYPE_CHECKING:
    import torch


def list_media(folder: str | Path, leave_out: Path) -> list[VideoSource]:
    """All videos and images below ``folder``, sorted by name, each once; hidden ones are left out.

    Args:
        folder: searched recursively.
        leave_out: a folder that is not searched: the evaluation's own output.

    Raises:
        UserError: the folder is missing or holds no video and no image.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"the video folder {root} does not exist; name a folder with videos.")
    known = VIDEO_EXTENSIONS | IMAGE_EXTENSIONS
    found = find_files(root, known, leave_out)
    if not found:
        raise UserError(
            f"the folder {root} holds no video and no image; known extensions are "
            f"{' '.join(sorted(known))}."
        )
    return [VideoSource(path.relative_to(root).as_posix(), path) for path in found]


def check_size(config: TokenizerEvalConfig, compression: Compression) -> None:
    """Refuses a size that was asked for and that the tokenizer cannot represent.

    Raises:
        GeometryError: names the sizes that do not fit and the nearest ones.
    """
    ClipGeometry(
        config.num_frames or 1,
        config.height or compression.height,
        config.width or compression.width,
        compression,
    )


def read_clip(path: Path, config: TokenizerEvalConfig, compression: Compression) -> torch.Tensor:
    """The first frames of a video, or an image as one frame.

    Returns:
        (3, T, H, W) uint8; T = 1 + k * compression.time, H and W whole blocks.

    Raises:
        VideoError: the file cannot be decoded, or is smaller than one block.
    """
    info = probe(path)
    height, width = config.height, config.width
    if height is None or width is None:
        height, width = info.height, info.width
    # Containers may announce more frames than they hold: the rest of the clip would be a still.
    limit = 1 if is_image(path) else config.num_frames or DEFAULT_NUM_FRAMES
    clip = read_clips(path, [0], min(limit, max(info.num_frames, 1)), height, width)[0]
    num_read = clip.frames.shape[1] - clip.num_repeated
    num_frames = 1 + (num_read - 1) // compression.time * compression.time
    rows = height // compression.height * compression.height
    columns = width // compression.width * compression.width
    if min(rows, columns) == 0:
        raise VideoError(
            f"{path} has {width}x{height} pixels, less than a block of the tokenizer "
            f"({compression.width}x{compression.height})."
        )
    top, left = (height - rows) // 2, (width - columns) // 2
    return clip.frames[:, :num_frames, top : top + rows, left : left + columns].contiguous()
