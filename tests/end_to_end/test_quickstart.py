"""The quickstart, whole: what a new user sees first must work, twice in a row."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from cosmos_posttrain.evaluation.figures import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


def quickstart(*arguments: object, quick: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "recipes/quickstart.sh", *map(str, arguments)],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        env={**os.environ, "QUICK": quick},
        timeout=timeout,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("quick", "lower"), [("1", 0.95), ("0", 2 / 3)])
def test_quickstart_twice(tmp_path: Path, quick: str, lower: float) -> None:
    output = tmp_path / "out"
    first = quickstart("--output", output, quick=quick, timeout=1800)
    assert first.returncode == 0, first.stderr
    for name in ("generated.mp4", "side_by_side.png", "loss_curve.png", "report.html"):
        assert (output / name).stat().st_size > 1000
    losses = [row["reduced_train_loss"] for row in read_metrics(output / "run_new")]
    last = losses[-min(20, len(losses) // 2) :]
    assert sum(last) / len(last) < lower * sum(losses[:5]) / 5
    second = quickstart("--output", output, quick=quick, timeout=600)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is complete already") == 2  # both preparations
    assert second.stdout.count("nothing to do: ") == 3  # the three trainings


@pytest.mark.parametrize(
    ("arguments", "quick", "words"),
    [(["--vidoes", "x"], "1", "unknown argument --vidoes"), ([], "yes", "QUICK is yes; use 1")],
)
def test_quickstart_refuses_what_it_does_not_know(
    arguments: list[str], quick: str, words: str
) -> None:
    result = quickstart(*arguments, quick=quick, timeout=60)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {words}")
