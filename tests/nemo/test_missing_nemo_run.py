"""Where NeMo-Run is missing: one sentence."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import pytest
from helpers.distributed_run import REPOSITORY_DIR

from cosmos_posttrain.errors import ConfigError


@pytest.mark.skipif(find_spec("nemo_run") is not None, reason="NeMo-Run is installed")
def test_a_recipe_without_nemo_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY_DIR / "recipes" / "nemo"))
    monkeypatch.setattr("sys.argv", ["launch.py", "cosmos_4b", "--", "--data_path", "/d"])
    with pytest.raises(ConfigError, match=r"run make nemo-env, or pip install '\.\[launch\]'"):
        importlib.import_module("launch").main()
