"""The output folder of an evaluation: what is done already, and when it is complete.

Flows in: settings and, one by one, the rows of finished videos. Flows out: ``metrics.json``, which
is written last. A killed evaluation leaves a folder that the same command continues:

    evaluation.json    the settings; removed at the end, as the next two
    rows.jsonl         one object a video, appended
    code_counts.npz    how often each code occurred in the first ``num_rows`` rows
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from cosmos_posttrain import files
from cosmos_posttrain.errors import DatasetError, OutputFolderError

if TYPE_CHECKING:
    from numpy.typing import NDArray

METRICS_FILE = "metrics.json"
SHEET_FILE = "contact_sheet.png"
_SETTINGS_FILE, _ROWS_FILE, _COUNTS_FILE = "evaluation.json", "rows.jsonl", "code_counts.npz"
# The order in which an overwritten evaluation is removed: nobody may take the rest for complete, or
# for another command's.
_OURS = (METRICS_FILE, SHEET_FILE, _COUNTS_FILE, _ROWS_FILE, _SETTINGS_FILE)


def _is_ours(name: str) -> bool:
    return name in _OURS


def check_foreign(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything that an evaluation did not write; changes nothing.

    Raises:
        OutputFolderError: it holds something else.
    """
    foreign = files.foreign_names(folder, _is_ours)
    names = os.listdir(folder) if folder.is_dir() else []
    if not {METRICS_FILE, _SETTINGS_FILE} & set(names):
        foreign += sorted(name for name in names if _is_ours(name))
    if foreign and not overwrite:
        raise OutputFolderError(
            f"the output folder {folder} holds something else ({foreign[0]}); name a new or empty "
            "folder."
        )


class ResultFolder:
    """One evaluation's folder, which the caller holds locked.

    Args:
        folder: where the results go.
        settings: all that decides them; another evaluation's folder is refused.
        vocab_size: length of the counts.

    Attributes:
        rows: of the finished videos, in order.
        counts: (vocab_size,) int64, over these rows.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], vocab_size: int) -> None:
        self.folder = folder
        self.settings = settings
        self.rows: list[dict[str, Any]] = []
        self.counts: NDArray[np.int64] = np.zeros(vocab_size, np.int64)

    def start(self, overwrite: bool) -> dict[str, Any] | None:
        """Makes the folder ready and takes up what is done; the metrics if it is complete.

        Raises:
            OutputFolderError: it holds another evaluation, and ``overwrite`` is off.
            DatasetError: a file there is damaged.
        """
        if overwrite:
            for name in _OURS:
                (self.folder / name).unlink(missing_ok=True)
        metrics = self.folder / METRICS_FILE
        if metrics.is_file():
            complete = files.read_json(metrics, DatasetError)
            self._check_same(complete.get("settings"))
            return complete
        if (self.folder / _SETTINGS_FILE).is_file():
            started = files.read_json(self.folder / _SETTINGS_FILE, DatasetError)
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
        """Reads the rows that the counts include; a row that was written after them is redone."""
        rows = self.folder / _ROWS_FILE
        try:
            # Of a damaged file numpy would leave the handle open.
            with np.load(io.BytesIO((self.folder / _COUNTS_FILE).read_bytes())) as saved:
                counts, num_rows = saved["counts"], int(saved["num_rows"])
            lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)[:num_rows]
            done = [json.loads(line) for line in lines]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            done, num_rows = [], 0
        if num_rows and len(done) == num_rows and counts.shape == self.counts.shape:
            self.rows, self.counts = done, counts
        files.write_json_lines(rows, self.rows)

    def append(self, row: dict[str, Any], counts: NDArray[np.int64] | None) -> None:
        """Takes in a finished video; ``counts`` (vocab_size,) is None where it failed."""
        self.rows.append(row)
        if counts is not None:
            self.counts = self.counts + counts
        with (self.folder / _ROWS_FILE).open("a", encoding="utf-8") as file:
            file.write(files.json_text(row) + "\n")
        with files.replacing(self.folder / _COUNTS_FILE) as temporary:
            np.savez(temporary, counts=self.counts, num_rows=np.int64(len(self.rows)))

    def abandon(self) -> None:
        """Removes what :meth:`start` wrote, unless a video is finished: nothing was evaluated."""
        if self.rows:
            return
        for name in _OURS:
            (self.folder / name).unlink(missing_ok=True)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Writes the metrics, which makes the folder complete, and removes what they replace."""
        files.write_json(self.folder / METRICS_FILE, metrics)
        for name in (_COUNTS_FILE, _ROWS_FILE, _SETTINGS_FILE):
            (self.folder / name).unlink(missing_ok=True)
