"""Where an evaluation of many clips keeps what it has, and where it ends up.

Flows in: settings, and tallies as they grow. Flows out: the metrics file, written last. A killed
evaluation leaves one file beside it, which the same command takes up:

    F.json           the metrics; makes the evaluation complete
    F.partial.npz    the settings and the tallies of the clips so far
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cosmos_posttrain import files
from cosmos_posttrain.errors import DatasetError, OutputFolderError, SaveError
from cosmos_posttrain.evaluation.tally import Tally

_SAVE_SECONDS = 30.0
_MAX_SHARE = 0.05  # of the time that may go into saving


def partial_file(path: Path) -> Path:
    """The file of an unfinished evaluation."""
    return path.with_name(f"{path.stem}.partial.npz")


class ScoreFile:
    """One evaluation's file, which the caller holds locked.

    Args:
        path: of the metrics.
        settings: all that decides them; another evaluation's file is refused.
        names: of the tallies.
        num_clips: of each.
        num_tokens: of a clip.

    Attributes:
        tallies: by name, as they are after :meth:`start`.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        names: Sequence[str],
        num_clips: int,
        num_tokens: int,
    ) -> None:
        self.path, self._partial = path, partial_file(path)
        self.settings: dict[str, Any] = json.loads(files.json_text(dict(settings)))
        self.tallies = {name: Tally.empty(num_clips, num_tokens) for name in names}
        self._seconds = 0.0
        self._start = self._last = time.monotonic()
        self._pause = _SAVE_SECONDS

    @property
    def seconds(self) -> float:
        """That the evaluation has taken so far, earlier processes counted in."""
        return self._seconds + time.monotonic() - self._start

    def start(self, overwrite: bool) -> dict[str, Any] | None:
        """Takes up what is done; the metrics if the evaluation is complete.

        Raises:
            OutputFolderError: the file is another evaluation's, or something else.
        """
        files.remove_leftovers(self.path.parent, {self.path.name, self._partial.name})
        if overwrite:
            self.path.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)
        if self.path.is_file():
            complete = files.read_json(self.path, DatasetError, "start anew with --overwrite")
            self._check_same(complete.get("settings"))
            return complete
        if self._partial.is_file():
            self._take_up()
        return None

    def _check_same(self, theirs: Any) -> None:
        theirs = theirs if isinstance(theirs, dict) else {}
        for key in self.settings | theirs:
            if self.settings.get(key) != theirs.get(key):
                raise OutputFolderError(
                    f"{self.path} holds another evaluation ({key} {self.settings.get(key)} here, "
                    f"{theirs.get(key)} there); name another --output, or start anew with "
                    "--overwrite."
                )

    def _take_up(self) -> None:
        """Reads the tallies; starts anew where the file is damaged."""
        try:
            # Of a damaged file numpy would leave the handle open.
            with np.load(io.BytesIO(self._partial.read_bytes())) as saved:
                settings = json.loads(bytes(saved["settings"]).decode())
                seconds = float(saved["seconds"])
                tallies = {
                    name: Tally(
                        saved[f"{name}.clips"], saved[f"{name}.places"], int(saved[f"{name}.done"])
                    )
                    for name in self.tallies
                }
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return
        self._check_same(settings)
        self.tallies, self._seconds = tallies, seconds

    def save(self, force: bool = False) -> None:
        """Writes what is done, unless it did so a short while ago.

        Raises:
            SaveError: it cannot be written.
        """
        now = time.monotonic()
        if not force and now - self._last < self._pause:
            return
        arrays: dict[str, Any] = {
            "settings": np.array(files.json_text(self.settings).encode()),
            "seconds": np.float64(self.seconds),
        }
        for name, tally in self.tallies.items():
            arrays[f"{name}.clips"], arrays[f"{name}.places"] = tally.clips, tally.places
            arrays[f"{name}.done"] = np.int64(tally.num_done)
        with (
            self._naming_full_disks(),
            files.replacing(self._partial) as temporary,
            temporary.open("wb") as file,
        ):
            np.savez(file, **arrays)
        self._last = time.monotonic()
        self._pause = max(_SAVE_SECONDS, (self._last - now) / _MAX_SHARE)

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics, which makes the evaluation complete.

        Raises:
            SaveError: they cannot be written.
        """
        with self._naming_full_disks():
            files.write_json(self.path, dict(metrics))
        self._partial.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _naming_full_disks(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"{self.path} could not be written ({error.strerror or error}); make room, and the "
                "same command goes on."
            ) from error
