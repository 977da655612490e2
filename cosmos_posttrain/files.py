"""Files that are whole or not there at all, and folders with one writer. No torch.

Flows in: bytes, values and paths. Flows out: files under their final names, hashes, and refusals of
folders that cannot be written to, hold something else, are being written, or are too full. Nothing
else in the package writes atomically, checks an output folder or locks one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cosmos_posttrain.errors import OutputFolderError, UserError

T = TypeVar("T")

LOCK_FILE = ".lock"
_TEMPORARY = re.compile(r"\.tmp-\d+-(.+)", re.DOTALL)
_HELD = {errno.EACCES, errno.EAGAIN}
# Of file systems that know no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


# Names and writing.


def temporary_path(path: Path, is_shared: bool = False) -> Path:
    """Where a file or folder is written before it gets its name: beside it, hidden.

    Args:
        path: the final path.
        is_shared: several processes write it together, so all of them get the same path.
    """
    return path.with_name(f".tmp-{0 if is_shared else os.getpid()}-{path.name}")


def final_name(name: str) -> str:
    """The name that a temporary name becomes in the end; any other is returned as it is."""
    while match := _TEMPORARY.fullmatch(name):
        name = match[1]
    return name


def is_leftover(name: str) -> bool:
    """True for temporary names: what a killed writer leaves behind."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_leftovers(folder: Path, names: Collection[str] | None = None) -> None:
    """Removes what killed writers left in a folder; for the one writer of it, or of these names."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_leftover(path.name) and (names is None or final_name(path.name) in names):
            remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder with all that is in it; absent is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file or a folder's list of names to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to; what lies there gets the name when the block ends.

    The file is forced to disk first. An error in the block removes it, and an older file under the
    name stays as it is.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically; see ``json_text``."""
    write_text(path, json_text(value, indent=2) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Writes one JSON object a line, atomically."""
    write_text(path, "".join(json_text(value) + "\n" for value in values))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON as the standard has it: numbers that are not finite become null."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(
    path: Path,
    error: type[UserError],
    fix: str = "restore it",
    unreadable: type[UserError] | None = None,
) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: the file.
        error: what is raised.
        fix: the advice that the sentence ends with.
        unreadable: what is raised where the file is missing or cannot be read; None means the same.

    Raises:
        UserError: of the given kind: the file is missing, damaged, or holds no object.
    """
    unreadable = unreadable or error
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as cause:
        raise unreadable(f"{path} is missing; {fix}.") from cause
    except OSError as cause:
        raise unreadable(f"{path} cannot be read: {cause.strerror}.") from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is damaged: it is not JSON ({cause}); {fix}.") from cause
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it holds no JSON object; {fix}.")
    return value


def sha256_of_file(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash of a value's canonical JSON (sorted keys, no spaces), in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


# Output folders.


def check_writable(folder: Path, what: str = "the output folder") -> None:
    """Refuses a folder that could not be made or written to; makes nothing.

    Raises:
        OutputFolderError: it is a file, lies below one, or permissions are missing.
    """
    if os.path.lexists(folder) and not os.path.isdir(folder):
        kind = "a link to nowhere" if os.path.islink(folder) else "a file"
        raise OutputFolderError(f"{what} {folder} is {kind}; name a new or empty folder.")
    existing = _existing(folder)
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        why = "may not be written to" if existing.is_dir() else "is not a folder"
        raise OutputFolderError(
            f"{what} {folder} cannot be written to: {existing} {why}; name another folder."
        )


def foreign_names(folder: Path, is_ours: Callable[[str], bool]) -> list[str]:
    """Names in a folder that this job does not write, sorted; temporary names and locks count."""
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(name for name in names if name != LOCK_FILE and not is_ours(final_name(name)))


def check_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuses to start writing what the disk cannot hold.

    Raises:
        OutputFolderError: states both sizes.
    """
    free = free_bytes(folder)
    if free < num_bytes:
        raise OutputFolderError(
            f"{what} needs {num_bytes / 1e9:.3f} GB, but only {free / 1e9:.3f} GB are free in "
            f"{folder}; make room, or choose another folder."
        )


def free_bytes(folder: Path) -> int:
    """Free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def num_bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _existing(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists, as far as this user may see."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))


# One writer. Record locks belong to a process: forked helpers do not inherit them, and they end
# with it however it ends. A name's lock is one byte of the folder's lock file, so that a batch of
# many names takes one descriptor. The table refuses a second writer within the process; where the
# file system knows no locks it is all there is, and holds no descriptor.

# The kernel compares each lock of a file with all others: 4,096 take half a second.
_MAX_NAMES = 4096


@dataclass
class _Lock:
    descriptor: int | None
    names: set[str] | None  # None is the whole folder


_locked: dict[Path, _Lock] = {}


@contextlib.contextmanager
def locked(
    folder: Path, name: Path | None = None, *, only: Collection[str] | None = None
) -> Iterator[None]:
    """Makes the folder if needed and holds it against a second writer until the block ends.

    A folder that was made here and into which nothing was written is removed again.

    Args:
        folder: the folder that the lock lies in.
        name: what is written, for messages, where that is not the folder itself.
        only: holds these names in the folder alone, so that others may write other names beside
            them; None, or more than a few thousand, hold the whole folder.

    Raises:
        OutputFolderError: another process, or this one, is writing there, or the folder cannot be
            made or written to.
    """
    held = None if only is None or len(only) > _MAX_NAMES else set(only)
    made = [p for p in (folder.absolute(), *folder.absolute().parents) if not os.path.exists(p)]
    path = folder.resolve() / LOCK_FILE
    name = name or folder
    try:
        _take(path, name, held)
    except OSError as error:
        reason = error.strerror or error
        raise OutputFolderError(
            f"{name} cannot be written to ({reason}); name another folder."
        ) from error
    try:
        yield
    finally:
        _release(path, held)
        with contextlib.suppress(OSError):  # not empty: the block has written something
            for parent in made:
                parent.rmdir()


def _take(path: Path, folder: Path, names: set[str] | None) -> None:
    lock = _locked.get(path)
    if lock is None:
        _locked[path] = _Lock(_open_locked(path, folder, names), names)
        return
    if names is None or lock.names is None or names & lock.names:
        what = folder / min(names & lock.names) if names and lock.names else folder
        raise OutputFolderError(f"{what} is being written by this process already.")
    if lock.descriptor is not None:
        _lock(lock.descriptor, folder, names)
    lock.names |= names


def _open_locked(path: Path, folder: Path, names: set[str] | None) -> int | None:
    """The descriptor of the locked file; None where the file system knows no locks."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if path.parent.exists():
                raise
            continue  # its owner has removed the empty folder meanwhile
        try:
            _lock(descriptor, folder, names)
        except OutputFolderError:
            is_theirs = _is_open(descriptor, path)
            os.close(descriptor)
            if is_theirs:
                raise
            continue  # its owner is just removing it
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:  # such a file system has no safer way
                path.unlink(missing_ok=True)
                return None
            raise
        # Its owner may have removed the file between open and lock.
        if _is_open(descriptor, path):
            break
        os.close(descriptor)
    with contextlib.suppress(OSError):  # a full disk: who waits is not told for whom
        os.ftruncate(descriptor, 0)
        if names is None:
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _is_open(descriptor: int, path: Path) -> bool:
    """True if the path still is the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, folder: Path, names: set[str] | None) -> None:
    """Locks the whole file, or the bytes of all the names, or nothing and raises."""
    done: list[str] = []
    what = folder
    try:
        if names is None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in sorted(names or ()):
            what = folder / name
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _byte(name))
            done.append(name)
    except OSError as error:
        _unlock(descriptor, done)
        if error.errno not in _HELD:
            raise
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        raise OutputFolderError(
            f"{what} is being written by another process{f' ({owner})' if owner else ''}; wait "
            f"until it ends, stop it, or name another {'folder' if names is None else 'output'}."
        ) from error


def _unlock(descriptor: int, names: Iterable[str]) -> None:
    for name in names:
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, _byte(name))


def _byte(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])


def _release(path: Path, names: set[str] | None) -> None:
    lock = _locked[path]
    if names is not None and lock.names is not None and lock.names - names:
        lock.names -= names
        if lock.descriptor is not None:
            _unlock(lock.descriptor, names)
        return
    del _locked[path]
    if lock.descriptor is None:
        return
    # Fails where the folder is gone or others hold names in it, whose file this is then too.
    with contextlib.suppress(OSError):
        if names is not None:
            fcntl.lockf(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    os.close(lock.descriptor)
