"""What becomes of a checkpoint's rows, and what a transfer refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.contracts import data_of, make_tokenizer
from helpers.token_pairs import (
    HIDDEN,
    NEW_SIZE,
    OLD_SIZE,
    dense_overlaps,
    make_old_rows,
    make_pairs,
)

from cosmos_posttrain.checkpoint.formats.registry import WRITABLE
from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.transfer.config import COOCCURRENCE_INITS
from cosmos_posttrain.transfer.digits import digit_rows
from cosmos_posttrain.transfer.embedding import EMBEDDING, OUTPUT, Transfer, plan_transfer


@pytest.fixture
def dense() -> tuple[np.ndarray, np.ndarray]:
    return dense_overlaps()


@pytest.fixture
def old_rows() -> torch.Tensor:
    return make_old_rows()


def config_of(vocab_size: int, **changes: Any) -> ModelConfig:
    return dataclasses.replace(preset("tiny"), vocab_size=vocab_size, hidden_size=16, **changes)


def source_of(config: ModelConfig, info: TokenizerInfo | None = None) -> CheckpointSource:
    data = None if info is None else data_of(info)
    return CheckpointSource(Path("somewhere"), WRITABLE["pt"], config, data)


@pytest.mark.parametrize("init", ["reset", "mean", "aligned", "omp"])
def test_special_tokens_keep_their_rows(
    dense: Any, old_rows: torch.Tensor, init: str, tmp_path: Path
) -> None:
    """<bov> and <pad> move with the vocabulary; what pads it is zero."""
    make_pairs(*dense).save(tmp_path / "c")
    path = str(tmp_path / "c") if init in COOCCURRENCE_INITS else None
    source = source_of(config_of(OLD_SIZE, context_dim=8))
    transfer = plan_transfer(source, init, NEW_SIZE, None, path, seed=3)
    special = torch.arange(64 * HIDDEN, dtype=torch.float32).view(64, HIDDEN)
    padding = torch.full((34, HIDDEN), 99.0)
    old = torch.cat([old_rows, special, padding])
    rows = transfer.padded_rows(EMBEDDING, old, 0.02)
    assert rows.shape == (128, HIDDEN)
    assert torch.equal(rows[NEW_SIZE : NEW_SIZE + 64], special)
    assert not rows[NEW_SIZE + 64 :].any() and float(rows[:NEW_SIZE].abs().max()) < 99
    assert transfer.config.bov_token == NEW_SIZE
    output = transfer.padded_rows(OUTPUT, torch.cat([old_rows, padding]), 0.02)
    assert output.shape == (64, HIDDEN) and not output[NEW_SIZE:].any() and output[:NEW_SIZE].any()


def test_mean_and_fresh_rows(old_rows: torch.Tensor) -> None:
    source = source_of(config_of(OLD_SIZE))
    transfer = plan_transfer(source, "mean", 4000, None, None, seed=3)
    rows = transfer.rows(EMBEDDING, old_rows, 0.02)
    assert torch.allclose(rows.mean(0), old_rows.mean(0), atol=0.01)
    # Never equal: see MEAN_NOISE.
    spread = float((old_rows - old_rows.mean(0)).square().mean().sqrt())
    assert float((rows - rows.mean(0)).std()) == pytest.approx(0.1 * spread, rel=0.02)
    fresh = Transfer(source, config_of(4000), "reset", seed=3)
    rows = fresh.rows(EMBEDDING, old_rows, 0.02)
    assert float(rows.std()) == pytest.approx(0.02, rel=0.02)
    assert torch.equal(rows, fresh.rows(EMBEDDING, old_rows, 0.02))
    assert not torch.equal(rows, fresh.rows(OUTPUT, old_rows, 0.02))
    assert not torch.equal(rows, dataclasses.replace(fresh, seed=4).rows(EMBEDDING, old_rows, 0.02))


def test_rows_by_digits(old_rows: torch.Tensor) -> None:
    old, new = make_tokenizer("old", OLD_SIZE, (6, 5)), make_tokenizer("new", NEW_SIZE, (5, 4))
    transfer = plan_transfer(source_of(config_of(OLD_SIZE), old), "digits", NEW_SIZE, new, None, 0)
    for name in (EMBEDDING, OUTPUT):
        rows = transfer.rows(name, old_rows, 0.02)
        assert torch.equal(rows, digit_rows(old_rows, (6, 5), (5, 4)))
    assert transfer.describe()["levels"] == {"old": (6, 5), "new": (5, 4)}
    # A checkpoint that does not name its tokenizer is taken to have the new one's levels.
    same = make_tokenizer("new", OLD_SIZE, (6, 5))
    unknown = source_of(config_of(OLD_SIZE))
    assert plan_transfer(unknown, "digits", OLD_SIZE, same, None, 0).levels == ((6, 5), (6, 5))


def test_digits_are_refused_where_nobody_knows_them() -> None:
    old, new = make_tokenizer("old", OLD_SIZE, (6, 5)), make_tokenizer("new", NEW_SIZE, (5, 4))
    source = source_of(config_of(OLD_SIZE), old)
    with pytest.raises(ConfigError, match="the data set has no manifest; prepare it with"):
        plan_transfer(source, "digits", NEW_SIZE, None, None, 0)
    with pytest.raises(ConfigError, match=r"does not name it and has 30 tokens where new has 20"):
        plan_transfer(source_of(config_of(OLD_SIZE)), "digits", NEW_SIZE, new, None, 0)
    three = make_tokenizer("new", NEW_SIZE, (5, 2, 2))
    with pytest.raises(ConfigError, match="as many digits, but the FSQ levels are 6,5 and 5,2,2"):
        plan_transfer(source, "digits", NEW_SIZE, three, None, 0)


@pytest.mark.parametrize("init", COOCCURRENCE_INITS)
def test_a_file_for_other_tokenizers_is_refused(dense: Any, tmp_path: Path, init: str) -> None:
    make_pairs(*dense).save(tmp_path / "c")
    own, new = make_tokenizer("old", OLD_SIZE), make_tokenizer("new", NEW_SIZE)

    def plan(source: CheckpointSource, size: int = NEW_SIZE, data: Any = new) -> Transfer:
        return plan_transfer(source, init, size, data, str(tmp_path / "c"), seed=0)

    fitting = source_of(config_of(OLD_SIZE), own)
    assert plan(fitting).pairs is not None
    assert plan(source_of(config_of(OLD_SIZE))).pairs is not None
    other = source_of(config_of(OLD_SIZE), make_tokenizer("wrong", OLD_SIZE))
    with pytest.raises(ConfigError, match=r"made with old tokenizer old .* the model's is wrong"):
        plan(other)
    with pytest.raises(ConfigError, match=r"made with old tokenizer .* model's is 31 tokens"):
        plan(source_of(config_of(31)))
    with pytest.raises(ConfigError, match=r"new tokenizer new .* the data set's is else"):
        plan(fitting, data=make_tokenizer("else", NEW_SIZE))
    with pytest.raises(ConfigError, match=r"new tokenizer new .* data set's is 21 tokens"):
        plan(fitting, size=21, data=None)
    with pytest.raises(ConfigError, match="fresh weights have nothing to transfer"):
        plan(CheckpointSource(None, None, config_of(OLD_SIZE)))
