from __future__ import annotations

from pathlib import Path

import pytest
from helpers.tokenizer_training_case import write_videos


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small synthetic videos."""
    return write_videos(tmp_path_factory.mktemp("videos"))
