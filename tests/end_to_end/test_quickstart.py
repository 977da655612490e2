"""The quickstarts, whole: what a new user sees first must work, twice in a row."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from cosmos_posttrain.evaluation.figures import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


def quickstart(
    *arguments: object, quick: str, timeout: float, recipe: str = "quickstart"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", f"recipes/{recipe}.sh", *map(str, arguments)],
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
    for name in (
        "run_new/evaluation/loss",
        "run_fresh/evaluation/loss",
        "run_new/evaluation/generate",
    ):
        assert (output / name / "metrics.json").is_file()
    losses = [row["reduced_train_loss"] for row in read_metrics(output / "run_new")]
    last = losses[-min(20, len(losses) // 2) :]
    assert sum(last) / len(last) < lower * sum(losses[:5]) / 5
    second = quickstart("--output", output, quick=quick, timeout=600)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is complete already") == 2  # both preparations
    assert second.stdout.count("nothing to do: ") == 3  # the three trainings


@pytest.mark.slow
@pytest.mark.parametrize(("quick", "least"), [("1", 0.0), ("0", 0.5)])
def test_quickstart_video2world_twice(tmp_path: Path, quick: str, least: float) -> None:
    arguments, output = ("--output", tmp_path / "out"), tmp_path / "out"
    settings = {"quick": quick, "recipe": "quickstart_video2world"}
    first = quickstart(*arguments, timeout=3000, **settings)
    assert first.returncode == 0, first.stderr
    written = {path: path.read_bytes() for path in output.rglob("*.mp4")}
    assert {"prompt_1.mp4", "prompt_2.mp4"} <= {path.name for path in written}
    assert (output / "side_by_side.png").stat().st_size > 1000
    hits, total = re.search(r"(\d+) of (\d+) held-out clips follow", first.stdout).groups()
    assert int(hits) >= least * int(total)
    assert quick == "1" or "the two videos differ by" in first.stdout
    second = quickstart(*arguments, timeout=900, **settings)
    assert second.returncode == 0, second.stderr
    assert f"{hits} of {total} held-out clips follow" in second.stdout
    assert "nothing to do: " in second.stdout  # the training
    assert written == {path: path.read_bytes() for path in output.rglob("*.mp4")}


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_video2world"])
@pytest.mark.parametrize(
    ("arguments", "quick", "words"),
    [(["--vidoes", "x"], "1", "unknown argument --vidoes"), ([], "yes", "QUICK is yes; use 1")],
)
def test_quickstart_refuses_what_it_does_not_know(
    arguments: list[str], quick: str, words: str, recipe: str
) -> None:
    result = quickstart(*arguments, quick=quick, timeout=60, recipe=recipe)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {words}")
