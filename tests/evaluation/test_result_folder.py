"""The folder of an evaluation: rows with and without sums, kills, and other people's files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cosmos_posttrain.errors import DatasetError, OutputFolderError
from cosmos_posttrain.evaluation.result_folder import ResultFolder, check_foreign, result

SETTINGS = {"command": "test", "size": (1, 2)}


def started(path: Path, **options: object) -> ResultFolder:
    path.mkdir(exist_ok=True)
    folder = ResultFolder(path, SETTINGS, ["clips", "table.csv"], **options)  # type: ignore[arg-type]
    assert folder.start(overwrite=False) is None
    return folder


def metrics(folder: ResultFolder) -> dict[str, object]:
    return result("test", folder.settings, {}, folder.rows, [], {}, folder.seconds)


@pytest.mark.parametrize("tail", ["", '{"row": {"video": "c"}', '{"row": {"video": "c"}, "sec\n'])
def test_rows_alone_are_taken_up(tmp_path: Path, tail: str) -> None:
    folder = started(tmp_path / "out")
    rows = [{"video": "a", "psnr": 1.5}, {"video": "b", "error": "gone"}]
    for row in rows:
        folder.append(row)
    with (tmp_path / "out" / "rows.jsonl").open("a") as file:
        file.write(tail)  # killed within a write
    again = started(tmp_path / "out")
    assert again.rows == rows
    assert again.seconds > 0
    again.append({"video": "c"})
    assert [row["video"] for row in started(tmp_path / "out").rows] == ["a", "b", "c"]
    again.finish(metrics(again))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]
    complete = ResultFolder(tmp_path / "out", SETTINGS).start(overwrite=False)
    assert complete is not None
    assert complete["rows"] == again.rows
    assert complete["command"] == "test"


def test_sums_go_with_their_rows(tmp_path: Path) -> None:
    zeros = {"nll": np.zeros((2, 2)), "count": np.zeros(3, np.int64)}
    folder = started(tmp_path / "out", sums=zeros)
    folder.append({"video": "a"}, {"nll": np.full((2, 2), 0.5), "count": np.arange(3)})
    with (tmp_path / "out" / "rows.jsonl").open("a") as file:
        file.write('{"row": {"video": "b"}, "seconds": 1.0}\n')  # killed before its sums
    again = started(tmp_path / "out", sums=zeros)
    assert [row["video"] for row in again.rows] == ["a"]
    again.append({"video": "b"}, {"nll": np.ones((2, 2))})
    assert again.sums["nll"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert again.sums["count"].tolist() == [0, 1, 2]
    other = started(tmp_path / "out", sums={"nll": np.zeros(7)})  # another version of the program
    assert other.rows == []


def test_another_evaluation_is_refused_and_overwritten(tmp_path: Path) -> None:
    folder = started(tmp_path / "out")
    folder.append({"video": "a"})
    (tmp_path / "out" / "clips" / "a").mkdir(parents=True)
    other = ResultFolder(tmp_path / "out", SETTINGS | {"size": [1, 3]}, ["clips"])
    with pytest.raises(OutputFolderError, match=r"\(size \[1, 3\] here, \[1, 2\] there\)"):
        other.start(overwrite=False)
    assert other.start(overwrite=True) is None
    assert other.rows == []
    assert not (tmp_path / "out" / "clips").exists()
    (tmp_path / "out" / "metrics.json").write_text("{")
    with pytest.raises(DatasetError, match=r"not JSON.*start anew with --overwrite"):
        other.start(overwrite=False)


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    check_foreign(tmp_path / "nowhere", [], overwrite=False)
    (tmp_path / "clips").mkdir()
    with pytest.raises(OutputFolderError, match=r"holds something else .clips."):
        check_foreign(tmp_path, ["clips"], overwrite=False)
    (tmp_path / "metrics.json").write_text(json.dumps({"settings": SETTINGS}))
    check_foreign(tmp_path, ["clips"], overwrite=False)
    with pytest.raises(OutputFolderError, match=r"holds something else .clips."):
        check_foreign(tmp_path, [], overwrite=False)
    check_foreign(tmp_path, ["clips"], overwrite=True)


def test_a_folder_in_which_nothing_was_evaluated_is_cleared(tmp_path: Path) -> None:
    folder = started(tmp_path / "out")
    folder.abandon()
    assert list((tmp_path / "out").iterdir()) == []
    folder = started(tmp_path / "out")
    folder.append({"video": "a"})
    folder.abandon()
    assert len(started(tmp_path / "out").rows) == 1
