"""The maths of rows for new tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.token_pairs import (
    HIDDEN,
    NEW_SIZE,
    OLD_SIZE,
    dense_overlaps,
    make_old_rows,
    make_pairs,
)

from cosmos_posttrain.transfer.rows import (
    PRIOR_SIGHTINGS,
    aligned_input_rows,
    aligned_output_rows,
    common_direction,
    prior_gap,
)


@pytest.fixture
def dense() -> tuple[np.ndarray, np.ndarray]:
    return dense_overlaps()


@pytest.fixture
def old_rows() -> torch.Tensor:
    return make_old_rows()


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


def test_gain_restores_what_noisy_old_tokens_take(old_rows: torch.Tensor) -> None:
    """Many old tokens for each new one: the averages lie five to nine times closer together."""
    volumes = np.random.default_rng(0).exponential(1.0, (NEW_SIZE, OLD_SIZE))
    rows = aligned_input_rows(old_rows, make_pairs(volumes, np.full(NEW_SIZE, 1000)))
    overall = torch.from_numpy(volumes.sum(0) / volumes.sum()).float()
    mean = overall @ old_rows
    before = overall @ (old_rows - mean).square().sum(1)
    contracted = torch.from_numpy(volumes / volumes.sum(1, keepdims=True)).float() @ old_rows - mean
    assert 25 < float(before / contracted.square().sum(1).mean()) < 81
    assert float((rows - mean).square().sum(1).mean()) == pytest.approx(float(before), rel=0.02)


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
