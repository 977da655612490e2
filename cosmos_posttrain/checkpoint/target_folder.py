"""The folder that a conversion writes: what may be in it, and how it comes to be there whole.

Flows in: a path, and what a conversion is made of. Flows out: whether the folder holds it already,
an empty folder to write to, and that folder under its final name.

``conversion.json`` (the marker) says what a folder was made from and how large its files are.
Without it a folder counts as something else, so it comes last and goes first.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmos_posttrain import files
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.formats import registry
from cosmos_posttrain.errors import CheckpointError, OutputFolderError

MARKER = "conversion.json"


class TargetFolder:
    """A conversion's target.

    Args:
        target: the folder; it may be absent.
        origin: the checkpoint that is converted.

    Raises:
        OutputFolderError: it is a file, or holds the origin.
    """

    def __init__(self, target: str | Path, origin: Path) -> None:
        self.path = Path(target).resolve()
        if self.path in (origin.resolve(), *origin.resolve().parents):
            raise OutputFolderError(
                f"{self.path} holds the source itself; choose another --target, nothing was "
                "changed."
            )
        if self.path.exists() and not self.path.is_dir():
            raise OutputFolderError(f"{self.path} is a file; choose a folder as --target.")

    def is_complete(self, wanted: dict[str, Any], overwrite: bool) -> bool:
        """True where it holds this very conversion; False where it may be written.

        Args:
            wanted: what makes one conversion the same as another.
            overwrite: whether it may be written whatever it holds.

        Raises:
            OutputFolderError: it holds something else.
        """
        if overwrite or self._is_empty():
            return False
        marker = _read_marker(self.path)
        if marker is None:
            raise OutputFolderError(
                f"{self.path} holds something else than a conversion; choose an empty or new "
                "folder, or give --overwrite."
            )
        if any(marker.get(key) != value for key, value in wanted.items()):
            raise OutputFolderError(
                f"{self.path} holds a conversion of {marker.get('source')} to "
                f"{marker.get('target_format')} that differs from this one; choose another "
                "folder, or give --overwrite."
            )
        recorded = marker.get("files")
        if not isinstance(recorded, dict) or recorded != _sizes(self.path, list(recorded)):
            raise OutputFolderError(
                f"{self.path} holds this conversion, but files were changed or removed since; "
                "give --overwrite to write it again."
            )
        return True

    @contextlib.contextmanager
    def replacing(self, marker: dict[str, Any], overwrite: bool) -> Iterator[Path]:
        """Gives an empty folder to write to; what lies there becomes the target at the end.

        An error in the block removes it and leaves the target as it was. What a conversion that was
        killed left is removed by the next one.

        Args:
            marker: what the conversion is made from, for ``conversion.json``.
            overwrite: see ``is_complete``.

        Raises:
            OutputFolderError: another process is writing the target, or has just done so.
            OSError: the disk is full, or fails.
        """
        workplace = self._workplace
        try:
            with files.locked(workplace, self.path):
                yield from self._written(workplace / "new", marker, overwrite)
        finally:
            # Where a conversion was killed it was there before, so the lock has left it.
            with contextlib.suppress(OSError):
                workplace.rmdir()

    def _written(self, new: Path, marker: dict[str, Any], overwrite: bool) -> Iterator[Path]:
        if not overwrite and not self._is_empty():
            raise OutputFolderError(
                f"{self.path} was written by another process in the meantime; give the same "
                "command again to see whether it holds what you want."
            )
        try:
            files.remove(new)
            new.mkdir()
            yield new
            self._complete(new, marker)
            self._take_over(new)
        finally:
            shutil.rmtree(new, ignore_errors=True)

    @property
    def _workplace(self) -> Path:
        """Where the conversion is written and locked: beside the target, which it is renamed to.

        A mounted volume cannot be renamed to, and what is beside it lies on another disk.
        """
        temporary = files.temporary_path(self.path, is_shared=True)
        return self.path / temporary.name if self.path.is_mount() else temporary

    def _is_empty(self) -> bool:
        """Absent, or nothing in it but what a killed conversion onto a mounted volume left."""
        return not self.path.is_dir() or all(p == self._workplace for p in self.path.iterdir())

    def _complete(self, new: Path, marker: dict[str, Any]) -> None:
        """Writes the marker and forces everything to disk: some disks are full only then."""
        written = sorted(path for path in new.rglob("*") if path.is_file())
        names = [str(path.relative_to(new)) for path in written]
        files.write_json(new / MARKER, {**marker, "files": _sizes(new, names)})
        for path in (*written, *(path for path in new.rglob("*") if path.is_dir()), new):
            files.sync(path)

    def _take_over(self, new: Path) -> None:
        """Gives the complete folder its name; files of other kinds in the target stay."""
        target = self.path
        if target not in new.parents and self._is_empty():
            new.replace(target)
            return
        marker = _read_marker(target) or {}
        old = {target / Path(name).parts[0] for name in marker.get("files", {})}
        old |= {path for pattern in registry.parts() for path in target.glob(pattern)}
        old |= {target / path.name for path in new.iterdir()}
        for path in sorted(old, key=lambda path: path.name != MARKER):
            files.remove(path)
        for path in sorted(new.iterdir(), key=lambda path: path.name == MARKER):
            path.replace(target / path.name)


def _read_marker(folder: Path) -> dict[str, Any] | None:
    if not (folder / MARKER).is_file():
        return None
    try:
        return context.read_json(folder / MARKER)
    except CheckpointError:
        return None


def _sizes(folder: Path, names: list[str]) -> dict[str, int]:
    """Bytes of the files that are there."""
    paths = {name: folder / name for name in names}
    return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}
