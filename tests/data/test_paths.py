"""What --data_path says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cosmos_posttrain.data.paths import DataPaths, parse_data_path
from cosmos_posttrain.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "paths", "weights"),
    [
        ("a", ("a",), None),
        ("a:0.7", ("a",), None),  # all of it, whatever its share
        ("a,b", ("a", "b"), None),
        ("a:0.7, b:0.3", ("a", "b"), (0.7, 0.3)),
        (["a:7", "b:3"], ("a", "b"), (7.0, 3.0)),
        (["a,b"], ("a,b",), None),
        ("s3:a,b", ("s3:a", "b"), None),
    ],
)
def test_forms(value: Any, paths: tuple[str, ...], weights: tuple[float, ...] | None) -> None:
    assert parse_data_path(value) == DataPaths(paths, weights)


def test_what_exists_is_a_path(tmp_path: Path) -> None:
    odd = tmp_path / "a,b:0.5"
    odd.mkdir()
    assert parse_data_path(str(odd)).paths == (str(odd),)
    assert parse_data_path([f"{odd}:2", "c:1"]) == DataPaths((str(odd), "c"), (2.0, 1.0))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (3, "is no path"),
        ([], "is no path"),
        ("a,,b", "has an empty entry"),
        ("a:0.5,b", "gives a share to some of the sets only"),
        ("a:0,b:1", "has a share that is not above 0"),
        ("a:nan,b:1", "has a share that is not above 0"),
        ("a:inf,b:1", "has a share that is not above 0"),
        ("a:1,./a:1", "names a data set twice"),
    ],
)
def test_bad_forms(value: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_data_path(value)
