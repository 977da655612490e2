"""Small data, and runs on it that several files of this folder look at; each is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.nemo_case import SCRIPTS, Train, finish, words_of
from helpers.prepared import make_videos, prepare_small
from helpers.prompts import prepare_prompts, write_lines


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    for name in ("videos", "texts"):
        (folder / name).mkdir()
    prepare_small(make_videos(folder / "videos"), folder / "base")
    prepare_prompts(write_lines(folder / "texts"), folder / "text")
    return {name: folder / name for name in SCRIPTS}


@pytest.fixture(scope="package")
def train(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Gives the run folder of an engine; runs it where it has not been run yet."""
    folder = tmp_path_factory.mktemp("runs")

    def run(engine: str, size: int, kind: str = "base") -> Path:
        log_dir = folder / f"{engine}-{size}-{kind}"
        if not log_dir.exists():
            finish(words_of(data, kind, log_dir, engine, size), size)
        return log_dir

    return run
