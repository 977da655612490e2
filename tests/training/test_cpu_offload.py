"""The optimizer in host memory: the same numbers as on the device, in every use of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.run_case import losses, make_config, run

OFFLOAD = {"optimizer__cpu_offload": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_curve(tokens: Path, tmp_path: Path, dtype: str) -> None:
    changes: dict[str, Any] = {"model__dtype": dtype}
    run(make_config(tokens, tmp_path / "plain", **changes))
    run(make_config(tokens, tmp_path / "offload", **changes, **OFFLOAD))
    assert losses(tmp_path / "offload") == losses(tmp_path / "plain")
