"""Rows of new tokens as sparse combinations of old ones."""

from __future__ import annotations

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

from cosmos_posttrain.transfer import pursuit
from cosmos_posttrain.transfer.pursuit import (
    anchors_of,
    pursue,
    pursued_input_rows,
    pursued_output_rows,
    sparse_combinations,
)


@pytest.fixture
def old_rows() -> torch.Tensor:
    return make_old_rows()


def test_a_planted_combination_is_found() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(40, 64, generator=generator)
    planted = torch.zeros(300, 40)  # more than one portion
    places = torch.stack([torch.randperm(40, generator=generator)[:3] for _ in planted])
    planted.scatter_(1, places, torch.tensor([[2.0, -1.0, 1.5]]).expand(300, 3))
    indices, factors = pursue(planted @ atoms, atoms, 3)
    found = torch.zeros_like(planted).scatter_(1, indices, factors)
    right = (found - planted).abs().amax(1) < 5e-3
    assert float(right.float().mean()) > 0.95
    # More terms than were planted come out as zeros, and none is taken twice.
    indices, factors = pursue(planted @ atoms, atoms, 6)
    assert all(len(set(row.tolist())) == 6 for row in indices)
    again = torch.zeros_like(planted).scatter_(1, indices, factors)
    assert torch.allclose(again[right], planted[right], atol=5e-3)


def test_pursuit_fits_all_chosen_atoms_anew() -> None:
    """Where atoms overlap, the first one's share changes as the second comes in."""
    atoms = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 9.0]])
    target = 1.0 * atoms[:1] + 2.0 * atoms[1:2]
    indices, factors = pursue(target, atoms, 2)
    assert indices.tolist() == [[1, 0]]
    assert factors[0].tolist() == pytest.approx([2.0, 1.0], abs=2e-3)
    # There are no more terms than atoms.
    assert pursue(target, atoms, 8)[0].shape == (1, 3)


def test_anchors_are_each_others_closest() -> None:
    volumes = np.array([[90.0, 5.0, 0.0], [10.0, 60.0, 0.0], [0.0, 50.0, 0.0]])
    new, old = anchors_of(make_pairs(volumes, np.full(3, 1000)))
    # Old token 1 is nearest to new token 1 and to 2, but closest to one of them only.
    assert (new.tolist(), old.tolist()) == ([0, 1], [0, 1])
    # A token that was seen once is not sure of anything.
    rare, _ = anchors_of(make_pairs(volumes, np.array([1000, 1, 1000])))
    assert rare.tolist() == [0, 2]


def test_anchors_keep_the_rows_of_their_old_tokens(old_rows: torch.Tensor) -> None:
    order = np.random.default_rng(0).permutation(OLD_SIZE)
    volumes = np.zeros((OLD_SIZE, OLD_SIZE))
    volumes[np.arange(OLD_SIZE), order] = 50.0
    pairs = make_pairs(volumes, np.full(OLD_SIZE, 100_000))
    table = sparse_combinations(pairs)
    for rows in (
        pursued_input_rows(old_rows, pairs, table),
        pursued_output_rows(old_rows, pairs, table),
    ):
        assert torch.allclose(rows, old_rows[order], atol=5e-3)


def test_rows_are_few_rows_and_the_mean(old_rows: torch.Tensor) -> None:
    volumes, occurrences = dense_overlaps()
    pairs = make_pairs(volumes, occurrences)
    table = sparse_combinations(pairs).to_dense()
    assert table.shape == (NEW_SIZE, OLD_SIZE)
    assert int((table != 0).sum(1).max()) <= pursuit.NUM_TERMS
    mean = torch.from_numpy(volumes.sum(0) / volumes.sum()).float() @ old_rows
    rows = pursued_input_rows(old_rows, pairs, table.to_sparse())
    assert torch.allclose(rows, mean + table @ (old_rows - mean), atol=1e-4)
    assert not table[7].any() and torch.allclose(rows[7], mean, atol=1e-5)  # never seen


def test_a_wide_profile_is_projected(
    old_rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many numbers as there are old tokens, a random projection changes little."""
    volumes, occurrences = dense_overlaps()
    pairs = make_pairs(volumes, occurrences * 1000)
    exact = pursued_input_rows(old_rows, pairs, sparse_combinations(pairs))
    monkeypatch.setattr(pursuit, "PROFILE_WIDTH", OLD_SIZE - 1)
    rows = pursued_input_rows(old_rows, pairs, sparse_combinations(pairs))
    assert rows.shape == exact.shape == (NEW_SIZE, HIDDEN)
    assert float(torch.cosine_similarity(rows, exact).median()) > 0.8
    monkeypatch.setattr(pursuit, "MAX_ANCHORS", 2)
    assert len(anchors_of(pairs)[0]) == 2
    used = sparse_combinations(pairs).to_dense().any(0)
    assert int(used.sum()) <= 2
