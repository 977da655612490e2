"""Which checkpoints stay."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers.run_case import make_config, run

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.training.config import validate
from cosmos_posttrain.training.retention import to_remove


@pytest.mark.parametrize(
    ("losses", "save_top_k", "keep_last_n", "removed"),
    [
        ([3.0, 2.0, 1.0], None, None, []),
        ([3.0, 2.0, 1.0], -1, 1, []),
        ([3.0, 2.0, 1.0], None, 1, [0, 1]),
        ([3.0, 2.0, 1.0], None, 5, []),
        ([1.0, 3.0, 2.0, 4.0], 1, 1, [1, 2]),
        ([1.0, 3.0, 2.0, 4.0], 2, None, [1]),
        # What was never validated is not among the best, and the newest stays all the same.
        ([None, 1.0, None, None], 1, 1, [0, 2]),
        # Of equal ones the newer stays.
        ([1.0, 1.0, 5.0], 1, 1, [0]),
        ([], 1, 1, []),
    ],
)
def test_what_is_removed(
    losses: list[float | None], save_top_k: int | None, keep_last_n: int | None, removed: list[int]
) -> None:
    assert to_remove(losses, save_top_k, keep_last_n) == removed


def _steps(log_dir: Path) -> list[int]:
    names = (path.name for path in (log_dir / "default" / "checkpoints").iterdir())
    return sorted(int(name.partition("step=")[2]) for name in names)


def test_a_run_keeps_the_last_and_the_best(tokens: Path, tmp_path: Path) -> None:
    """The validation loss falls over this run, so the best are the last ones."""
    settings = {"max_steps": 8, "save_every_n_steps": 2}
    run(make_config(tokens, tmp_path / "last", keep_last_n=1, **settings))
    assert _steps(tmp_path / "last") == [7]
    run(make_config(tokens, tmp_path / "best", save_top_k=2, **settings))
    assert len(_steps(tmp_path / "best")) in (2, 3) and 7 in _steps(tmp_path / "best")


def test_the_best_need_a_validation(tokens: Path, tmp_path: Path) -> None:
    config = make_config(tokens, tmp_path / "run", save_top_k=1, limit_val_batches=0)
    with pytest.raises(ConfigError, match="validation is off here"):
        run(config)
    assert not (tmp_path / "run").exists()


def test_every_checkpoint_that_may_be_the_best_is_validated(tokens: Path, tmp_path: Path) -> None:
    """Validated at every 3rd step and saved at every 2nd, two of three would be thrown away."""
    settings = {"save_every_n_steps": 2, "val_check_interval": 3}
    config = make_config(tokens, tmp_path / "run", save_top_k=2, **settings)
    with pytest.raises(ConfigError, match="--save_every_n_steps 2 must be a multiple of --val_ch"):
        validate(config, world_size=1)
    for changes in ({"val_check_interval": 1}, {"save_top_k": -1}, {"save_top_k": None}):
        validate(dataclasses.replace(config, **changes), world_size=1)
    config = make_config(tokens, tmp_path / "run", save_top_k=-1, keep_last_n=2)
    with pytest.raises(ConfigError, match="--keep_last_n 2 has no effect with --save_top_k -1"):
        validate(config, world_size=1)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"limit_val_batches": 0}, "--limit_val_batches is 0"),
        ({"data__split_string": "4,0,1"}, "no clip falls in the validation split"),
    ],
)
def test_an_interval_without_validations_is_a_note(
    settings: dict[str, Any], why: str, tokens: Path, tmp_path: Path, capsys: Any
) -> None:
    run(make_config(tokens, tmp_path / "run", max_steps=1, val_check_interval=5, **settings))
    said = capsys.readouterr().out
    assert f"note: --val_check_interval 5 changes nothing: {why}." in said
