"""What the package needs of a library that reads and writes video.

Flows in and out: nothing; these are the types between ``clips.py``, ``write.py`` and the libraries
(``with_pyav.py``, ``with_torchcodec.py``), of which ``choice.py`` picks one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class EncodingError(Exception):
    """A library cannot write; says why, fit for the end of a sentence."""


@dataclass(frozen=True)
class VideoInfo:
    """What a player would say about a file.

    Attributes:
        num_frames: frames in presentation order.
        fps: average frames a second; 0.0 where the file does not say.
        height: pixels, upright and with square pixels.
        width: pixels, upright and with square pixels.
        duration_seconds: 0.0 where the file does not say.
    """

    num_frames: int
    fps: float
    height: int
    width: int
    duration_seconds: float


@dataclass(frozen=True)
class VideoHeader:
    """What a file says before a frame of it is asked for.

    Attributes:
        height: pixels as they are stored.
        width: likewise.
        fps: average frames a second; 0.0 where the file does not say.
        duration_seconds: 0.0 where the file does not say.
    """

    height: int
    width: int
    fps: float
    duration_seconds: float


@dataclass(frozen=True)
class Fit:
    """What becomes of a decoded frame: upright, scaled until both sides cover, centre-cropped.

    Attributes:
        height: pixels of the result.
        width: likewise.
        is_fine: full chroma and exact rounding; otherwise as FFmpeg's own tools by default.
        check: called with the stored width and height of each frame before it is scaled.
    """

    height: int
    width: int
    is_fine: bool = True
    check: Callable[[int, int], None] | None = None


class VideoBackend(Protocol):
    """A library that reads and writes video; the modules ``with_*.py`` are each one."""

    def label(self) -> str:
        """``pyav 16.1.0 (FFmpeg 8.0)``: its name, version and FFmpeg, for the record."""
        ...

    def read_header(self, path: str | Path) -> VideoHeader:
        """Raises VideoError: the file cannot be opened."""
        ...

    def probe(self, path: str | Path) -> VideoInfo:
        """Decodes one frame, which proves that it can be decoded; else raises VideoError."""
        ...

    def iter_pixels(
        self, path: str | Path, wanted: Sequence[int], fit: Fit
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yields number and pixels (height, width, 3) uint8 RGB of the wanted frames, ascending.

        Numbers past the end are left out. Raises VideoError: a wanted frame cannot be decoded.
        """
        ...

    def encode(self, path: Path, images: Iterator[NDArray[np.uint8]], fps: float) -> None:
        """Writes (H, W, 3) uint8 RGB images as H.264 in an mp4.

        Raises EncodingError: the library cannot; what ``images`` raises stays what it is.
        """
        ...

    def check_encoder(self) -> None:
        """Raises EncodingError: it has no H.264 encoder."""
        ...
