"""The maths of rows for new tokens, and what a transfer refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.contracts import data_of, make_tokenizer

from cosmos_posttrain.checkpoint.formats.registry import WRITABLE
from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.transfer.cooccurrence import Cooccurrence
from cosmos_posttrain.transfer.embedding import (
    EMBEDDING,
    OUTPUT,
    Transfer,
    plan_transfer,
)
from cosmos_posttrain.transfer.rows import (
    PRIOR_SIGHTINGS,
    aligned_input_rows,
    aligned_output_rows,
    common_direction,
    prior_gap,
)

OLD_SIZE, NEW_SIZE, HIDDEN = 30, 20, 16


def make_pairs(volumes: np.ndarray, occurrences: np.ndarray) -> Cooccurrence:
    """From a dense C[v, o]."""
    new, old = np.nonzero(volumes)
    return Cooccurrence(
        make_tokenizer("old", volumes.shape[1]),
        make_tokenizer("new", volumes.shape[0]),
        new.astype(np.int32),
        old.astype(np.int32),
        volumes[new, old].astype(np.float32),
        occurrences,
        {"num_clips": 3, "num_new_tokens": int((occurrences > 0).sum())},
    )


@pytest.fixture
def dense() -> tuple[np.ndarray, np.ndarray]:
    """C with many zeros, and sightings; token 7 was never seen, token 8 once."""
    generator = np.random.default_rng(0)
    volumes = generator.exponential(1.0, (NEW_SIZE, OLD_SIZE))
    volumes *= generator.random((NEW_SIZE, OLD_SIZE)) < 0.2
    volumes[7] = 0
    volumes[8] = 0
    volumes[8, 3] = 1
    occurrences = generator.integers(1, 60, NEW_SIZE) * (volumes.sum(1) > 0)
    occurrences[8] = 1
    return volumes, occurrences


@pytest.fixture
def old_rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(OLD_SIZE, HIDDEN, generator=generator) + 1.0


def shares(volumes: np.ndarray, occurrences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q(o|v) and P(o), written out."""
    overall = volumes.sum(0) / volumes.sum()
    result = np.empty(volumes.shape)
    for v in range(len(volumes)):
        total, n = volumes[v].sum(), occurrences[v]
        own = volumes[v] / total if total else overall
        result[v] = (n * own + PRIOR_SIGHTINGS * overall) / (n + PRIOR_SIGHTINGS)
    return result, overall


def test_output_rows_are_expected_rows(dense: Any, old_rows: torch.Tensor) -> None:
    volumes, occurrences = dense
    table, overall = shares(volumes, occurrences)
    pairs = make_pairs(volumes, occurrences)
    gap = np.log((occurrences + 0.5) / (occurrences + 0.5).sum())
    gap -= table @ np.log(np.maximum(overall, 1e-6))
    np.testing.assert_allclose(prior_gap(pairs), gap, atol=1e-5)
    direction = common_direction(old_rows, torch.from_numpy(overall).float()).double().numpy()
    expected = table @ old_rows.double().numpy() + np.outer(gap, direction)
    np.testing.assert_allclose(aligned_output_rows(old_rows, pairs), expected, atol=1e-5)


def test_common_direction_is_found_in_the_output_rows() -> None:
    """Where a part of the hidden states tells how common tokens are, u points along it."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, HIDDEN, generator=generator)
    common = 0.3 * torch.randn(HIDDEN, generator=generator)
    direction = common_direction(rows, torch.softmax(rows @ common, 0))
    assert float(torch.cosine_similarity(direction, common, dim=0)) > 0.9
    # The ridge makes the state that is found shorter, at most by half, so u longer.
    assert 0.9 < float(direction @ common) < 2.2


def test_input_rows_keep_their_distance_from_the_mean(dense: Any, old_rows: torch.Tensor) -> None:
    volumes, occurrences = dense
    table, overall = shares(volumes, occurrences)
    rows = old_rows.double().numpy()
    mean, averaged = overall @ rows, table @ rows
    found = aligned_input_rows(old_rows, make_pairs(volumes, occurrences)).double().numpy()
    # In the direction of the averages, all by the same gain.
    gain = (found - mean)[0] / (averaged - mean)[0]
    assert gain.std() < 1e-4 and gain.mean() > 1.2
    np.testing.assert_allclose(found - mean, gain.mean() * (averaged - mean), atol=1e-4)
    before = overall @ ((rows - mean) ** 2).sum(1)
    after = occurrences / occurrences.sum() @ ((found - mean) ** 2).sum(1)
    assert after == pytest.approx(before, rel=1e-4)


def test_gain_does_not_blow_noise_up(old_rows: torch.Tensor) -> None:
    """Where new tokens say next to nothing about the old ones, all rows stay near the mean."""
    volumes = np.ones((NEW_SIZE, OLD_SIZE)) + 1e-3 * np.random.default_rng(0).random((20, 30))
    pairs = make_pairs(volumes, np.full(NEW_SIZE, 100))
    rows = aligned_input_rows(old_rows, pairs)
    assert float((rows - rows.mean(0)).norm(dim=1).max()) < 0.01


def test_renamed_tokens_get_their_own_rows_back(old_rows: torch.Tensor) -> None:
    order = np.random.default_rng(0).permutation(OLD_SIZE)
    volumes = np.zeros((OLD_SIZE, OLD_SIZE))
    volumes[np.arange(OLD_SIZE), order] = 50.0
    pairs = make_pairs(volumes, np.full(OLD_SIZE, 100_000))
    # Equally common too, so nothing goes along the common direction.
    for rows in (aligned_output_rows(old_rows, pairs), aligned_input_rows(old_rows, pairs)):
        assert torch.allclose(rows, old_rows[order], atol=1e-3)


def test_output_rows_bound_the_mixture_from_below(dense: Any, old_rows: torch.Tensor) -> None:
    """The logits, with b as it is, are a lower bound (ELBO) of log sum_o P(v|o) p(o|h)."""
    volumes = dense[0][dense[0].sum(1) > 0]
    volumes = volumes[:, volumes.sum(0) > 0]
    rows = old_rows[: volumes.shape[1]]
    joint = volumes / volumes.sum()
    p_old, p_new = joint.sum(0), joint.sum(1)
    # So many sightings that nothing is drawn towards P(o).
    pairs = make_pairs(volumes, (p_new * 1e12).astype(np.int64))
    gap = prior_gap(pairs)
    averaged = aligned_output_rows(rows, pairs)
    averaged -= torch.outer(gap, common_direction(rows, torch.from_numpy(p_old).float()))
    slacks = []
    for seed in range(5):
        hidden = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(seed))
        log_p = torch.log_softmax(rows @ hidden, 0)
        mixture = torch.from_numpy(joint / p_old).float() @ log_p.exp()
        bound = averaged @ hidden - torch.logsumexp(rows @ hidden, 0) + gap
        slacks.append(mixture.log() - bound)
    assert float(torch.stack(slacks).min()) > -1e-3
    # Tokens that are made of one old token alone reach it.
    alone = torch.from_numpy((volumes > 0).sum(1) == 1)
    assert alone.any() and float(torch.stack(slacks)[:, alone].abs().max()) < 1e-2


def config_of(vocab_size: int, **changes: Any) -> ModelConfig:
    return dataclasses.replace(preset("tiny"), vocab_size=vocab_size, hidden_size=16, **changes)


def source_of(config: ModelConfig, info: TokenizerInfo | None = None) -> CheckpointSource:
    data = None if info is None else data_of(info)
    return CheckpointSource(Path("somewhere"), WRITABLE["pt"], config, data)


@pytest.mark.parametrize("init", ["reset", "mean", "aligned"])
def test_special_tokens_keep_their_rows(
    dense: Any, old_rows: torch.Tensor, init: str, tmp_path: Path
) -> None:
    """<bov> and <pad> move with the vocabulary; what pads it is zero."""
    make_pairs(*dense).save(tmp_path / "c")
    path = str(tmp_path / "c") if init == "aligned" else None
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


def test_a_file_for_other_tokenizers_is_refused(dense: Any, tmp_path: Path) -> None:
    make_pairs(*dense).save(tmp_path / "c")
    own, new = make_tokenizer("old", OLD_SIZE), make_tokenizer("new", NEW_SIZE)

    def plan(source: CheckpointSource, size: int = NEW_SIZE, data: Any = new) -> Transfer:
        return plan_transfer(source, "aligned", size, data, str(tmp_path / "c"), seed=0)

    fitting = source_of(config_of(OLD_SIZE), own)
    assert "20 new tokens" in plan(fitting).sentence()
    assert "does not say" in plan(source_of(config_of(OLD_SIZE))).sentence()
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
