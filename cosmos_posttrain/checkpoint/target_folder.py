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
    def replacing(self, marker: dict[str, Any]) -> Iterator[Path]:
        """Gives an empty folder to write to; what lies there becomes the target at the end.

        An error in the block removes it and leaves the target as it was.

        Args:
            marker: what the conversion is made from, for ``conversion.json``.
        """
        temporary = self._temporary
        try:
            # Left there by a conversion that was killed.
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            names = sorted(
                str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file()
            )
            files.write_json(temporary / MARKER, {**marker, "files": _sizes(temporary, names)})
            self._take_over(temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @property
    def _temporary(self) -> Path:
        """Where the conversion is written: beside the target, from where it is renamed.

        A mounted volume cannot be renamed to, and what is beside it lies on another disk.
        """
        folder = self.path if self.path.is_mount() else self.path.parent
        return folder / f".{self.path.name}.converting"

    def _is_empty(self) -> bool:
        """Absent, or nothing in it but what a killed conversion onto a mounted volume left."""
        return not self.path.is_dir() or all(p == self._temporary for p in self.path.iterdir())

    def _take_over(self, temporary: Path) -> None:
        """Gives the complete folder its name; files of other kinds in the target stay."""
        target = self.path
        if temporary.parent != target and self._is_empty():
            temporary.replace(target)
            return
        marker = _read_marker(target) or {}
        old = {target / Path(name).parts[0] for name in marker.get("files", {})}
        old |= {path for pattern in registry.parts() for path in target.glob(pattern)}
        old |= {target / path.name for path in temporary.iterdir()}
        for path in sorted(old, key=lambda path: path.name != MARKER):
            files.remove(path)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == MARKER):
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
