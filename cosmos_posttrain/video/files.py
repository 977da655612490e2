"""Which files are videos, and whether a file is whole, without decoding anything.

Flows in: folders and paths. Flows out: sorted lists of videos, or one sentence that says what is
wrong with a file.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path

from cosmos_posttrain.errors import UserError, VideoError

VIDEO_EXTENSIONS = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .ts .mts .m2ts .mpg .mpeg .wmv .flv .3gp .ogv .gif".split()
)
IMAGE_EXTENSIONS = frozenset(".jpg .jpeg .png .bmp .webp .tif .tiff".split())

_PEEK_BYTES = 512
_PRINTABLE = bytes(range(32, 127)) + b"\t\n\r\f"


def is_image(path: str | Path) -> bool:
    """True if the file's extension is one of ``IMAGE_EXTENSIONS``, in any case."""
    return Path(path).suffix.lower() in IMAGE_EXTENSIONS


def list_videos(folder: str | Path) -> list[Path]:
    """All videos below ``folder``, sorted by their relative path; hidden files are left out.

    Links are followed; see :func:`find_files`.

    Raises:
        UserError: the folder is missing or holds no file with a known extension.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"the video folder {root} does not exist; name a folder with videos.")
    found = find_files(root, VIDEO_EXTENSIONS)
    if not found:
        known = " ".join(sorted(VIDEO_EXTENSIONS))
        raise UserError(f"the folder {root} holds no video; known extensions are {known}.")
    return found


def find_files(
    root: Path, extensions: Collection[str], leave_out: Path | None = None
) -> list[Path]:
    """Files below a folder by extension, each once, sorted; hidden ones are left out.

    Links to folders and files are followed, also out of ``root``. What several ways lead to counts
    once: under its own path where it lies below ``root``, else under the first link to it.

    Args:
        root: where to begin.
        extensions: in lower case, with their dot.
        leave_out: a folder below ``root`` that is not searched.
    """
    walked: set[str] = set()
    left_out = None if leave_out is None else os.path.realpath(leave_out)
    found: list[str] = []
    links: list[str] = []
    folders, linked = deque([str(root)]), deque[str]()
    while folders or linked:
        folder = folders.popleft() if folders else linked.popleft()  # links last: own paths win
        real = os.path.realpath(folder)
        if real in walked or (walked and real == left_out):
            continue
        walked.add(real)
        for entry in _visible(folder):
            if _is_folder(entry):
                (linked if entry.is_symlink() else folders).append(entry.path)
            elif Path(entry.name).suffix.lower() in extensions:
                (links if entry.is_symlink() else found).append(entry.path)
    targets: set[str] = set()
    for link in sorted(links):
        target = os.path.realpath(link)
        parent, name = os.path.split(target)
        is_media = not name.startswith(".") and Path(name).suffix.lower() in extensions
        is_listed = is_media and parent in walked and os.path.isfile(target)
        if not is_listed and target not in targets:
            found.append(link)
        targets.add(target)
    return [Path(path) for path in sorted(found)]


def _visible(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder but the hidden, sorted; nothing where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return []
    return sorted(shown, key=lambda entry: entry.name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: a file that cannot be read, and is reported as one
        return False


def _top_level_boxes(path: Path, num_bytes: int) -> Iterator[tuple[bytes, int]]:
    """The (type, end offset) of each outermost box of an ISO media file (mp4, mov)."""
    with path.open("rb") as file:
        offset = 0
        while offset + 8 <= num_bytes:
            file.seek(offset)
            header = file.read(16)
            size, kind = int.from_bytes(header[:4], "big"), header[4:8]
            if size == 1 and len(header) == 16:
                size = int.from_bytes(header[8:16], "big")
            end = num_bytes if size == 0 else offset + size
            yield kind, end
            if end <= offset:
                return
            offset = end


def _vint(data: bytes, offset: int) -> tuple[int, int]:
    """Matroska's variable-length number at an offset: (value, its length in bytes)."""
    length = 9 - data[offset].bit_length() if offset < len(data) else 9
    if length > 8 or offset + length > len(data):
        return 0, 0
    value = int.from_bytes(data[offset : offset + length], "big") & ((1 << 7 * length) - 1)
    return value, length


def _announced_end(head: bytes) -> int:
    """Where a Matroska or AVI file says that it ends; 0 for other files and where it does not."""
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == b"\x1a\x45\xdf\xa3":
        header_bytes, length = _vint(head, 4)
        segment = 4 + length + header_bytes
        size, length = _vint(head, segment + 4)
        is_known = length > 0 and size != (1 << 7 * length) - 1
        if head[segment : segment + 4] == b"\x18\x53\x80\x67" and is_known:
            return segment + 4 + length + size
    return 0


def check_whole(path: Path) -> None:
    """Refuses what cannot be a whole media file, from a few bytes of it.

    A file that lost its tail is refused even where its first frames could still be decoded: half a
    file is a failed copy, and half of its clips would be silently missing.

    Raises:
        VideoError: the file is missing, empty, text, or cut off (mp4, mov, mkv, webm, avi).
    """
    if not path.exists():
        raise VideoError(f"{path} does not exist.")
    if not path.is_file():
        raise VideoError(f"{path} is not a file.")
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        raise VideoError(f"{path} is empty (0 bytes).")
    try:
        with path.open("rb") as file:
            head = file.read(_PEEK_BYTES)
    except OSError as error:
        raise VideoError(f"{path} cannot be read: {error.strerror}.") from error
    # Playlists are text too, and would make FFmpeg open other files: refused with the rest.
    if not head.translate(None, _PRINTABLE):
        raise VideoError(f"{path} holds text, not video.")
    end = _announced_end(head)
    if end > num_bytes:
        raise VideoError(
            f"{path} is truncated: it should end at byte {end}, but has {num_bytes} bytes."
        )
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        kinds = set()
        for kind, end in _top_level_boxes(path, num_bytes):
            kinds.add(kind)
            if end > num_bytes and kind in (b"mdat", b"moov", b"moof"):
                raise VideoError(
                    f"{path} is truncated: its {kind.decode()!r} part ends at byte {end}, "
                    f"the file at byte {num_bytes}."
                )
        if b"moov" not in kinds:
            raise VideoError(f"{path} is truncated: it has no index (moov atom).")
