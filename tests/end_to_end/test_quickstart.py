"""The quickstart, whole: what a new user sees first must work, twice in a row."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cosmos_posttrain.evaluation.figures import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quickstart_twice(tmp_path: Path) -> None:
    command = ["bash", "recipes/quickstart.sh", "--output", str(tmp_path / "out")]
    first = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=1800)
    assert first.returncode == 0, first.stderr
    for name in ("generated.mp4", "side_by_side.png", "loss_curve.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    losses = [row["reduced_train_loss"] for row in read_metrics(tmp_path / "out" / "run_new")]
    assert sum(losses[-20:]) / 20 < 2 / 3 * sum(losses[:5]) / 5
    second = subprocess.run(command, cwd=REPOSITORY, text=True, capture_output=True, timeout=600)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is complete already") == 2  # both preparations
    assert second.stdout.count("nothing to do: ") == 3  # the three trainings


def test_quickstart_refuses_unknown_arguments() -> None:
    command = ["bash", "recipes/quickstart.sh", "--vidoes", "x"]
    result = subprocess.run(
        command, cwd=REPOSITORY, text=True, capture_output=True, env=os.environ, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown argument --vidoes")
