"""The process that decodes an upload: little memory, little time, nothing to steal.

Flows in: one JSON object as the only argument (``Wanted``), the file in the working folder. Flows
out: the frames as ``FRAMES_FILE`` beside it, and one JSON object on standard output, with what was
found or with the sentence that refuses the file. What a file makes of a decoder stays in here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import resource
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain.errors import UserError, VideoError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FRAMES_FILE = "given.npy"
_IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")


@dataclass(frozen=True)
class Wanted:
    """What is to be read of an upload.

    Attributes:
        name: of the file in the working folder.
        num_frames: that are given of a clip; an image gives one.
        height: pixels of the frames.
        width: likewise.
        max_side: pixels of the longer side that are let in.
        max_seconds: of a clip that are let in.
        memory_bytes: for the file; the process ends where it needs more.
        cpu_seconds: likewise.
    """

    name: str
    num_frames: int
    height: int
    width: int
    max_side: int
    max_seconds: float
    memory_bytes: int = 2 * 2**30
    cpu_seconds: int = 20


@dataclass(frozen=True)
class Found:
    """What an upload is.

    Attributes:
        is_image: else it is a clip.
        num_given: frames that are given.
        num_repeated: of those, how many repeat the last one because the clip was too short.
        fps: 0.0 for an image, and where the file does not say.
    """

    is_image: bool
    num_given: int
    num_repeated: int
    fps: float


def limit_process(wanted: Wanted) -> None:
    """Takes memory, time and files away from this process, for good.

    What it took to come here stays: the one library for video is larger than the other.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + wanted.cpu_seconds
    for kind, amount in (
        (resource.RLIMIT_AS, pages * resource.getpagesize() + wanted.memory_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, wanted.memory_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(kind, (amount, amount))


def read(wanted: Wanted) -> tuple[Found, NDArray[np.uint8]]:
    """Decodes what is needed of a file: (3, T, H, W) uint8, as ``read_input`` gives it.

    Raises:
        VideoError: it is no image and no clip, or too large or long.
    """
    import numpy as np

    from cosmos_posttrain.video import is_image
    from cosmos_posttrain.video.backend import Fit
    from cosmos_posttrain.video.choice import chosen

    path, is_still = Path(wanted.name), is_image(wanted.name)
    if is_still:
        _check_image(path, wanted.max_side)
    count = 1 if is_still else wanted.num_frames
    video = chosen()
    header = video.read_header(path)
    _check_side(path, header.width, header.height, wanted.max_side)
    if not is_still and header.duration_seconds > wanted.max_seconds:
        raise VideoError(
            f"{path} lasts {header.duration_seconds:.0f} s, and at most {wanted.max_seconds:g} s "
            "are let in; cut its beginning out."
        )
    fps = 0.0 if is_still else header.fps
    check = functools.partial(_check_side, path, max_side=wanted.max_side)
    fit = Fit(wanted.height, wanted.width, check=check)
    images = [pixels for _, pixels in video.iter_pixels(path, range(count), fit)]
    if not images:
        raise VideoError(f"{path} has no frame that can be decoded.")
    num_repeated = count - len(images)
    frames = np.stack(images + images[-1:] * num_repeated).transpose(3, 0, 1, 2)
    return Found(is_still, count, num_repeated, fps), np.ascontiguousarray(frames)


def _check_image(path: Path, max_side: int) -> None:
    """Reads the header alone, before anything is decoded."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the sentence below says it better
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            size = image.size
    except (OSError, ValueError, SyntaxError) as error:
        raise VideoError(f"{path} is not an image that can be read.") from error
    _check_side(path, *size, max_side)


def _check_side(path: Path, width: int, height: int, max_side: int) -> None:
    if max(width, height) > max_side:
        raise VideoError(
            f"{path} has {width:,}x{height:,} pixels, and at most {max_side:,} a side are let in; "
            "make it smaller."
        )


def main(argument: str) -> dict[str, Any]:
    """Reads an upload and leaves its frames; returns what is printed."""
    import numpy as np

    from cosmos_posttrain.video.choice import chosen

    wanted = Wanted(**json.loads(argument))
    try:
        chosen()
    except UserError as error:
        return {"problem": str(error)}
    limit_process(wanted)
    try:
        found, frames = read(wanted)
    except VideoError as error:
        return {"problem": str(error)}
    np.save(FRAMES_FILE, frames)
    return dataclasses.asdict(found)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(main(sys.argv[1])), flush=True)
