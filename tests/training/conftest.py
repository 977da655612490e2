"""One small prepared data set for all training tests of a worker."""

from pathlib import Path

import pytest
from helpers.prepared import make_videos, prepare_small


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips of 3x2x3 tokens from five videos."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "videos").mkdir()
    prepare_small(make_videos(folder / "videos"), folder / "tokens")
    return folder / "tokens"
