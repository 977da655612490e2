"""Files that cannot be read now, told apart from files whose contents are damaged. No torch.

Flows in: open files, and what reading them raised. Flows out: a view of a part of a file that keeps
the system's own error, which torch and zipfile hide; and why a read failed, in the system's words.
"""

from __future__ import annotations

import errno
import io
import re
from typing import Any

NO_MEMORY = "there is not enough host memory for it"


class FileWindow(io.RawIOBase):
    """A part of an open file that looks like a file of its own.

    Args:
        file: open for reading bytes.
        offset: where the part begins.
        length: of the part, in bytes.

    Attributes:
        length: the same.
        problem: what the last failed read raised; None where all went well.
    """

    def __init__(self, file: Any, offset: int, length: int) -> None:
        self.length = length
        self.problem: OSError | MemoryError | None = None
        self._file, self._offset, self._position = file, offset, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise ValueError("a place before the file's begin")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        size = max(0, min(len(view), self.length - self._position))
        try:
            self._file.seek(self._offset + self._position)
            count: int = self._file.readinto(view[:size])
        except (OSError, MemoryError) as error:
            self.problem = error
            raise
        self._position += count
        return count


def refusal(error: BaseException, num_bytes: int | None = None) -> str | None:
    """Why something could not be read, where that says nothing of what it holds; else None.

    Args:
        error: what reading raised.
        num_bytes: of the file: torch asks for more memory than that only where a damaged file says
            so. None where that is not known.
    """
    if isinstance(error, OSError):
        # Python's own have no number; a place that a truncated file does not have is invalid.
        is_the_systems = error.errno not in (None, errno.EINVAL)
        return str(error.strerror or error) if is_the_systems else None
    if isinstance(error, MemoryError):
        return NO_MEMORY
    if not isinstance(error, RuntimeError):
        return None
    said = str(error)
    if re.search(r"unable to mmap .*allocate memory", said):
        return NO_MEMORY
    asked = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", said)
    if asked and (num_bytes is None or int(asked[1]) <= num_bytes):
        return NO_MEMORY
    return None
