"""Which library reads and writes video in this process: PyAV, else torchcodec.

Flows in: what is installed, and the environment's ``COSMOS_VIDEO_DECODER`` (``pyav`` or
``torchcodec``), which asks for one of them. Flows out: a ``VideoBackend``, and its name and version
for the record of what it decoded.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib.metadata import version

from cosmos_posttrain.errors import UserError
from cosmos_posttrain.video.backend import EncodingError, VideoBackend

VARIABLE = "COSMOS_VIDEO_DECODER"
# Name here -> the module that is imported for it; the first that is installed is taken.
MODULES = {"pyav": "av", "torchcodec": "torchcodec"}


def chosen() -> VideoBackend:
    """The library that this process reads and writes video with.

    Raises:
        UserError: none is installed, or the one asked for cannot be loaded.
    """
    return loaded(decoder_name())


def check_writing() -> None:
    """Before anything is computed that is to become an mp4.

    Raises:
        UserError: as ``chosen``, or that has no H.264 encoder.
    """
    backend = chosen()
    try:
        backend.check_encoder()
    except EncodingError as error:
        raise UserError(f"no mp4 can be written by {backend.label()}: {error}.") from error


def decoder_label() -> str:
    """``pyav 16.1.0 (FFmpeg 8.0)``: what decodes here, for the record.

    Raises:
        UserError: as ``chosen``.
    """
    return chosen().label()


def decoder_name() -> str:
    """``pyav`` or ``torchcodec``: what decodes here, not loaded yet.

    Raises:
        UserError: none is installed, or ``COSMOS_VIDEO_DECODER`` names no such library.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked:
        if asked not in MODULES:
            raise UserError(f"{VARIABLE} is {asked!r}; it may be {' or '.join(MODULES)}.")
        return asked
    for name, module in MODULES.items():
        if importlib.util.find_spec(module) is not None:
            return name
    raise UserError(
        "nothing here can read video: install PyAV (pip install av) or, where it cannot be, "
        "torchcodec."
    )


@functools.cache
def loaded(name: str) -> VideoBackend:
    """The library of that name, imported.

    Raises:
        UserError: it is not installed, or cannot be loaded.
    """
    try:
        if name == "pyav":
            import av  # noqa: F401

            from cosmos_posttrain.video import with_pyav

            return with_pyav
        import torchcodec
        from torchcodec.decoders import VideoStreamMetadata

        rotation = "rotation" in VideoStreamMetadata.__dataclass_fields__
        if not (rotation and hasattr(torchcodec, "ffmpeg_major_version")):
            raise UserError(
                f"torchcodec {version('torchcodec')} is too old to read video with: 0.11 or newer "
                "is needed, or PyAV (pip install av)."
            )
        from cosmos_posttrain.video import with_torchcodec

        return with_torchcodec
    # torchcodec's, over many lines, where FFmpeg's libraries are missing: RuntimeError or OSError.
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(_why_not(name, error)) from error


def _why_not(name: str, error: BaseException) -> str:
    """One sentence on a library that cannot be loaded."""
    if isinstance(error, ModuleNotFoundError) and error.name == MODULES[name]:
        return f"{name} is to read video and is not installed: pip install {MODULES[name]}."
    if name == "torchcodec":
        return (
            "torchcodec is installed but cannot be loaded: it needs FFmpeg's shared libraries "
            "(versions 4 to 8; apt-get install ffmpeg) and a build that fits torch; PyAV (pip "
            "install av) needs neither."
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return (
        f"PyAV is installed but cannot be loaded ({reason}); install it anew, or set "
        f"{VARIABLE}=torchcodec where that is installed."
    )
