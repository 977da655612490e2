"""The experiment of docs/embedding_transfer.md: its script, in small, and its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ARMS = ("aligned", "keep", "omp", "digits", "fresh")


def recipe(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "recipes/embedding_transfer.sh", *arguments],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        env={**os.environ, **env},
        timeout=1800,
    )


@pytest.mark.slow
def test_recipe_twice(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    subprocess.run([sys.executable, "recipes/sample_videos.py", str(videos)], check=True)
    size = {"SEEDS": "4", "ARMS": "keep aligned_first", "REAL_ARMS": "keep fresh"}
    size |= {"NUM_VIDEOS": "224", "SWAP_VIDEOS": "90", "OLD_STEPS": "101", "STEPS": "20"}
    size |= {"REAL_OLD_STEPS": "21", "REAL_STEPS": "20", "NUM_GENERATED": "3"}
    output = tmp_path / "output"
    first = recipe("--output", str(output), "--videos", str(videos), **size)
    assert first.returncode == 0, first.stderr
    assert (output / "embedding_transfer.png").stat().st_size > 1000
    assert (output / "small" / "generated_4" / "motion.md").is_file()
    for arm in ("keep", "aligned_first", "fresh"):
        assert f"| {arm} | " in first.stdout
    second = recipe("--output", str(output), "--videos", str(videos), **size)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is complete\n") == 5
    assert "step 1/" not in second.stdout


def test_recipe_refuses_unknown_arguments() -> None:
    result = recipe("--vidoes", "x")
    assert result.returncode == 2
    assert result.stderr.startswith("error: unknown argument --vidoes")


def figures(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "recipes/embedding_transfer_figures.py", "--output", str(output)]
    return subprocess.run(
        [*command, "--figure", str(output / "figure.png")],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=300,
    )


def write_run(folder: Path, losses: dict[int, float]) -> None:
    """Metrics of a run that was validated after so many steps."""
    (folder / "default").mkdir(parents=True)
    rows: list[dict[str, float]] = [{"step": 0, "reduced_train_loss": 7.0}]
    rows += [{"step": n - 1, "val_loss": loss} for n, loss in losses.items()]
    path = folder / "default" / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tables_count_what_has_ended(tmp_path: Path) -> None:
    for seed in (1, 2):
        for number, arm in enumerate(ARMS):
            losses = {20: 6.0 + number + seed, 40: 5.0 + number}
            if (seed, arm) == (2, "fresh"):  # still going on
                del losses[40]
            write_run(tmp_path / "small" / f"seed_{seed}" / arm, losses)
    write_run(tmp_path / "small" / "seed_3" / "aligned", {20: 1.0, 40: 1.0})  # without keep
    result = figures(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "left out: fresh" in result.stdout and "| fresh |" not in result.stdout
    assert "| aligned | 7.500 | 5.000 | 5.000, 5.000 |" in result.stdout
    # 7.5 -> 5.0 passes 6.0, where keep ends, on the way: after 20 + 20 * 1.5 / 2.5 steps.
    assert "| aligned | 32 | 30, 33 |" in result.stdout
    assert "| keep | 40 | 40, 40 |" in result.stdout and "| omp | - | -, - |" in result.stdout
    assert "| small world: start | 20 steps, 29k tokens | 40 steps, 58k tokens |" in result.stdout
    assert (tmp_path / "figure.png").stat().st_size > 1000
    written = (tmp_path / "embedding_transfer.md").read_text()
    assert "| aligned | 32 | 30, 33 |" in written and "real clips" not in written
    empty = figures(tmp_path / "small")
    assert empty.returncode == 2 and "holds no finished run of keep" in empty.stderr
