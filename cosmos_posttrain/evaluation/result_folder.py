"""The output folder of an evaluation: what is done already, and when it is complete.

Flows in: settings and, one by one, the rows of finished inputs. Flows out: ``metrics.json``, which
is written last, in the one shape that all commands have (``result``). A killed evaluation leaves a
folder that the same command continues:

    evaluation.json    the settings; removed at the end, as the next two
    rows.jsonl         {"row": one input's figures, "seconds": that it took} a line, appended
    sums.npz           arrays that are added up over the first ``num_rows`` rows, if there are any
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from cosmos_posttrain import files
from cosmos_posttrain.errors import DatasetError, OutputFolderError

if TYPE_CHECKING:
    from numpy.typing import NDArray

METRICS_FILE = "metrics.json"
_SETTINGS_FILE, _ROWS_FILE, _SUMS_FILE = "evaluation.json", "rows.jsonl", "sums.npz"
_PROGRESS = (_SUMS_FILE, _ROWS_FILE, _SETTINGS_FILE)


def result(
    command: str,
    settings: Mapping[str, Any],
    figures: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """What ``metrics.json`` holds, whatever the command.

    Args:
        command: of evaluate.py.
        settings: all that decides the figures.
        figures: over all rows.
        rows: of each input that could be evaluated.
        failures: of the others, each with its ``error``.
        environment: what it was measured with; see ``environment.py``.
        seconds: in all, over every process that had a part.
    """
    return {
        "command": command,
        "settings": dict(settings),
        "figures": dict(figures),
        "rows": list(rows),
        "failures": list(failures),
        "environment": dict(environment),
        "seconds": round(seconds, 3),
    }


class ResultFolder:
    """One evaluation's folder, which the caller holds locked.

    Args:
        folder: where the results go.
        settings: all that decides them; another evaluation's folder is refused.
        products: what the command writes beside ``metrics.json``, files or folders; a subfolder's
            parts are named by its own name.
        sums: name -> array of zeros, to be added to with every row.

    Attributes:
        rows: of the finished inputs, in order; one that failed has an ``error``.
        sums: over these rows.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        products: Sequence[str] = (),
        sums: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(files.json_text(dict(settings)))
        self.rows: list[dict[str, Any]] = []
        self.sums: dict[str, NDArray[Any]] = dict(sums or {})
        # The order in which an overwritten evaluation is removed: nobody may take the rest for
        # complete, or for another command's.
        self._ours = (METRICS_FILE, *products, *_PROGRESS)
        self._seconds = 0.0
        self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """That the evaluation has taken so far, earlier processes counted in."""
        return self._seconds + time.monotonic() - self._last

    def start(self, overwrite: bool) -> dict[str, Any] | None:
        """Makes the folder ready and takes up what is done; the metrics if it is complete.

        Raises:
            OutputFolderError: it holds another evaluation, and ``overwrite`` is off.
            DatasetError: a file there is damaged.
        """
        self._last = time.monotonic()
        if overwrite:
            self._remove()
        metrics = self.folder / METRICS_FILE
        if metrics.is_file():
            complete = files.read_json(metrics, DatasetError, "start anew with --overwrite")
            self._check_same(complete.get("settings"))
            return complete
        if (self.folder / _SETTINGS_FILE).is_file():
            started = files.read_json(
                self.folder / _SETTINGS_FILE, DatasetError, "start anew with --overwrite"
            )
            self._check_same(started.get("settings"))
        files.remove_leftovers(self.folder)
        files.write_json(self.folder / _SETTINGS_FILE, {"settings": self.settings})
        self._take_up()
        return None

    def _check_same(self, theirs: Any) -> None:
        theirs = theirs if isinstance(theirs, dict) else {}
        for key in self.settings | theirs:
            ours, others = self.settings.get(key), theirs.get(key)
            if ours != others:
                raise OutputFolderError(
                    f"the output folder {self.folder} holds another evaluation ({key} "
                    f"{ours} here, {others} there); name another folder, or start anew with "
                    "--overwrite."
                )

    def _take_up(self) -> None:
        """Reads the rows that the sums include; a row that was written after them is redone."""
        path = self.folder / _ROWS_FILE
        lines: list[dict[str, Any]] = []
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            text = ""
        for line in text.split("\n")[:-1]:  # what a newline does not end was not written whole
            try:
                value = json.loads(line)
                lines.append({"row": dict(value["row"]), "seconds": float(value["seconds"])})
            except (ValueError, KeyError, TypeError):
                break
        if self.sums:
            lines = self._take_up_sums(lines)
        self.rows = [line["row"] for line in lines]
        self._seconds = sum(line["seconds"] for line in lines)
        files.write_json_lines(path, lines)

    def _take_up_sums(self, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Reads the sums; returns the lines that they include, none where they are damaged."""
        try:
            # Of a damaged file numpy would leave the handle open.
            with np.load(io.BytesIO((self.folder / _SUMS_FILE).read_bytes())) as saved:
                num_rows = int(saved["num_rows"])
                sums = {name: saved[name] for name in self.sums}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return []
        fits = all(sums[name].shape == zeros.shape for name, zeros in self.sums.items())
        if not fits or num_rows > len(lines):
            return []
        self.sums = sums
        return lines[:num_rows]

    def append(
        self, row: Mapping[str, Any], addends: Mapping[str, NDArray[Any]] | None = None
    ) -> None:
        """Takes in a finished input.

        Args:
            row: its figures, or its ``error``.
            addends: what it adds to each of the sums; None is nothing.
        """
        now = time.monotonic()
        line = {"row": dict(row), "seconds": round(now - self._last, 6)}
        self._seconds += now - self._last
        self._last = now
        self.rows.append(dict(row))
        for name, addend in (addends or {}).items():
            self.sums[name] = self.sums[name] + addend
        with (self.folder / _ROWS_FILE).open("a", encoding="utf-8") as file:
            file.write(files.json_text(line) + "\n")
        if self.sums:
            with files.replacing(self.folder / _SUMS_FILE) as temporary:
                arrays: dict[str, Any] = {"num_rows": np.int64(len(self.rows)), **self.sums}
                np.savez(temporary, **arrays)

    def abandon(self) -> None:
        """Removes what :meth:`start` wrote, unless an input is finished: nothing was evaluated."""
        if not self.rows:
            self._remove()

    def finish(self, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics, which makes the folder complete, and removes what they replace."""
        files.write_json(self.folder / METRICS_FILE, dict(metrics))
        for name in _PROGRESS:
            (self.folder / name).unlink(missing_ok=True)

    def _remove(self) -> None:
        for name in self._ours:
            files.remove(self.folder / name)


def check_foreign(folder: Path, products: Sequence[str], overwrite: bool) -> None:
    """Refuses a folder that holds anything that this command did not write; changes nothing.

    Raises:
        OutputFolderError: it holds something else.
    """
    is_ours: Callable[[str], bool] = {METRICS_FILE, *products, *_PROGRESS}.__contains__
    foreign = files.foreign_names(folder, is_ours)
    names = os.listdir(folder) if folder.is_dir() else []
    if not {METRICS_FILE, _SETTINGS_FILE} & set(names):
        foreign += sorted(name for name in names if is_ours(name))
    if foreign and not overwrite:
        raise OutputFolderError(
            f"the output folder {folder} holds something else ({foreign[0]}); name a new or empty "
            "folder."
        )
