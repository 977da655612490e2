"""docs/converging.md's table and the recipe that measures it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.distributed_run import REPOSITORY_DIR

from cosmos_posttrain.errors import CosmosPosttrainError


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY_DIR / "recipes"))
    import converging

    return converging


def table(text: str) -> list[list[str]]:
    """Cells of the first table's rows."""
    lines = [line for line in text.split("\n\n| run |")[1].splitlines()[2:] if line]
    end = next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def test_the_table_has_the_rows_of_the_recipe(recipe: Any) -> None:
    rows = table((REPOSITORY_DIR / "docs" / "converging.md").read_text(encoding="utf-8"))
    runs = [run for run in recipe.RUNS.values() if run.what]
    named = [[what, num, flags.strip("`"), float(bound)] for what, num, flags, _, bound in rows]
    assert named == [[run.what, str(run.num_processes), run.flags, run.bound] for run in runs]
    assert all(float(found) <= float(bound) for *_, found, bound in rows)


def test_every_layout_is_continued_to_the_last_bit(recipe: Any) -> None:
    for name, layout in recipe.LAYOUTS.items():
        run = recipe.RUNS[f"{name}_continued"]
        assert (run.against, run.after, run.bound) == (name, (name, 10), 0.0)
        assert (run.num_processes, run.flags) == (layout.num_processes, layout.flags)


@pytest.mark.slow
@pytest.mark.distributed
def test_recipe_twice_and_beyond_a_bound(recipe: Any, tmp_path: Path) -> None:
    runs = {name: recipe.RUNS[name] for name in ("one", "tp", "tp_continued")}
    recipe.measure(tmp_path, runs)
    text = (tmp_path / "converging.md").read_text(encoding="utf-8")
    differences = [float(cells[3]) for cells in table(f"\n\n{text}")]
    assert differences[0] > 0 and differences[1] == 0
    checkpoints = sorted((tmp_path / "tp_continued").glob("default/checkpoints/*=19/weights/*"))
    written = [path.stat().st_mtime_ns for path in checkpoints]
    recipe.measure(tmp_path, runs)
    assert written and [path.stat().st_mtime_ns for path in checkpoints] == written
    path = tmp_path / "tp_continued" / "default" / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    row = json.loads(last)
    row["reduced_train_loss"] *= 1 + 1e-9
    path.write_text("\n".join([*lines, json.dumps(row)]) + "\n")
    with pytest.raises(CosmosPosttrainError, match="TP 2, stopped after 10 steps and continued"):
        recipe.measure(tmp_path, runs)
