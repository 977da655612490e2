"""The experiment of docs/embedding_transfer.md: its script, in small, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INITS = ("aligned", "keep", "reset", "mean", "fresh")


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
    size = {"SEEDS": "4", "PRETRAINING_STEPS": "6", "STEPS": "10"}
    first = recipe("--output", str(tmp_path), **size)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "embedding_transfer.png").stat().st_size > 1000
    for init in INITS:
        assert f"| {init} | " in first.stdout
    second = recipe("--output", str(tmp_path), **size)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is complete\n") == 6
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


def test_table_counts_whole_seeds_only(tmp_path: Path) -> None:
    for seed, names in ((1, INITS), (2, INITS), (3, INITS[:2]), (4, INITS)):
        for number, init in enumerate(names):
            run = tmp_path / f"seed_{seed}" / init / "default"
            run.mkdir(parents=True)
            rows = [
                {"step": 0, "reduced_train_loss": 7.0},
                {"step": 9, "val_loss": 6.0 + number + seed},
                {"step": 19, "val_loss": 5.0 + number},
            ]
            # The last run of seed 4 is still going on.
            kept = rows[:2] if (seed, init) == (4, "fresh") else rows
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    result = figures(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| aligned | 7.500 | 5.000 | 5.000 | 5.000 |" in result.stdout
    assert "reset - aligned after 20 steps: +2.000, +2.000 nats/token" in result.stdout
    assert (tmp_path / "figure.png").stat().st_size > 1000
    empty = figures(tmp_path / "seed_1")
    assert empty.returncode == 2 and "holds no seed with all runs" in empty.stderr
