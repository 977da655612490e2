"""Input embeddings and output rows of new tokens as sparse combinations of old tokens' rows.

Flows in: a checkpoint's rows and a ``Cooccurrence``. Flows out: rows of the new tokens. After
"Training-Free Tokenizer Transplantation via Orthogonal Matching Pursuit" (arXiv 2506.06607); what
was adapted, and why, is in docs/embedding_transfer.md.

    x[v] ~ sum_a A[v, a] x[new(a)]               at most NUM_TERMS anchors a for each new token v
    E_new[v] = m + sum_a A[v, a] (E_old[old(a)] - m)

x[v] says which old tokens stand where v stands, more or less often than everywhere. An anchor is a
new and an old token of which each is the other's closest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_posttrain.transfer.cooccurrence import Cooccurrence
from cosmos_posttrain.transfer.rows import (
    common_direction,
    log_shares,
    new_log_shares,
    old_token_shares,
    pair_volumes,
    trust_in,
)

# Anchors of one new token (k in the paper).
NUM_TERMS = 8
# Pairs of tokens to choose from, the most common ones.
MAX_ANCHORS = 4096
# Numbers in a profile; those of larger vocabularies are projected at random.
PROFILE_WIDTH = 1024
# Of the small systems of equations, whose anchors may resemble each other; 1 is an anchor's own.
RIDGE = 1e-4
# New tokens at a time: (PORTION, terms, anchors) float32 numbers stand in memory.
PORTION = 256


def sparse_combinations(pairs: Cooccurrence) -> Tensor:
    """A: the anchors of each new token and what they count.

    Returns:
        (new vocabulary, old vocabulary) sparse float32, at most ``NUM_TERMS`` numbers in a row; a
        row without any for a token that was never seen.
    """
    new, old = anchors_of(pairs)
    profiles = _profiles(pairs)
    indices, factors = pursue(profiles, profiles[new], NUM_TERMS)
    rows = torch.arange(len(profiles))[:, None].expand_as(indices)
    size = (pairs.new.vocab_size, pairs.old.vocab_size)
    places = torch.stack([rows.reshape(-1), old[indices].reshape(-1)])
    table = torch.sparse_coo_tensor(places, factors.reshape(-1), size, check_invariants=True)
    return table.coalesce()


def anchors_of(pairs: Cooccurrence) -> tuple[Tensor, Tensor]:
    """New and old tokens that are each other's closest.

    Close is what shares much of the volume of both: C[v, o] / sqrt(C[v] C[o]), less by
    n / (n + k) for tokens v that were seen n times only.

    Returns:
        (A,) int64 distinct new tokens and (A,) int64 distinct old ones, the most common first.
    """
    new, old, volumes, by_new, by_old = pair_volumes(pairs)
    close = volumes * (by_new[new] * by_old[old]).rsqrt() * trust_in(pairs)[new]
    is_best = _is_first_best(close, new, pairs.new.vocab_size)
    is_best &= _is_first_best(close, old, pairs.old.vocab_size)
    chosen = is_best.nonzero()[:, 0]
    chosen = chosen[volumes[chosen].argsort(descending=True, stable=True)[:MAX_ANCHORS]]
    return new[chosen], old[chosen]


def _is_first_best(values: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Which values are the first of the largest in their group: (N,) bool."""
    best = values.new_zeros(num_groups).scatter_reduce_(0, groups, values, "amax")
    places = torch.where(values == best[groups], torch.arange(len(values)), len(values))
    first = torch.full((num_groups,), len(values)).scatter_reduce_(0, groups, places, "amin")
    return torch.arange(len(values)) == first[groups]


def _profiles(pairs: Cooccurrence) -> Tensor:
    """x: (new vocabulary, width) float32."""
    shares, overall = old_token_shares(pairs)
    # A difference counts by what is usual for its token, as in correspondence analysis.
    scale = overall.clamp(min=1e-12).rsqrt() * (overall > 0)
    if len(overall) > PROFILE_WIDTH:
        generator = torch.Generator().manual_seed(0)
        axes = torch.randn(len(overall), PROFILE_WIDTH, generator=generator)
        axes *= (scale / PROFILE_WIDTH**0.5)[:, None]
    else:
        axes = scale.diag()
    trust = torch.sparse.sum(shares, dim=1).to_dense()
    return torch.sparse.mm(shares, axes).addr_(trust, overall @ axes, alpha=-1)


def pursue(targets: Tensor, atoms: Tensor, num_terms: int) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit, for many targets at once.

    Each round takes the atom that points most along what is left, and fits all taken ones anew.

    Args:
        targets: (N, D) float32.
        atoms: (A, D) float32, of any lengths; zeros are never of use.
        num_terms: largest number of atoms for a target.

    Returns:
        (N, K) int64 distinct atoms, and (N, K) float32 factors; K is at most A.
    """
    lengths = atoms.norm(dim=1).clamp(min=1e-12)
    units = atoms / lengths[:, None]
    gram = units @ units.T
    parts = [_pursue_portion(part @ units.T, gram, num_terms) for part in targets.split(PORTION)]
    indices = torch.cat([part[0] for part in parts])
    return indices, torch.cat([part[1] for part in parts]) / lengths[indices]


def _pursue_portion(products: Tensor, gram: Tensor, num_terms: int) -> tuple[Tensor, Tensor]:
    """``pursue`` by products alone: (N, A) of targets and unit atoms, (A, A) among the atoms."""
    indices = torch.empty(len(products), 0, dtype=torch.int64)
    factors = products.new_empty(len(products), 0)
    left = products
    for _ in range(min(num_terms, len(gram))):
        best = left.abs().scatter_(1, indices, -1).argmax(1, keepdim=True)
        indices = torch.cat([indices, best], 1)
        system = gram[indices[:, :, None], indices[:, None]].double()
        system.diagonal(dim1=1, dim2=2).add_(RIDGE)
        wanted = products.gather(1, indices).double()
        factors = torch.linalg.solve(system, wanted).to(products.dtype)
        left = torch.baddbmm(products[:, None], factors[:, None], gram[indices], alpha=-1)[:, 0]
    return indices, factors


def pursued_input_rows(old_rows: Tensor, pairs: Cooccurrence, combinations: Tensor) -> Tensor:
    """Input embeddings of the new tokens.

    Args:
        old_rows: (old vocabulary, hidden), any float dtype.
        pairs: the co-occurrence.
        combinations: of ``sparse_combinations``.

    Returns:
        (new vocabulary, hidden) float32.
    """
    return _combined(old_rows.float(), pairs, combinations)


def pursued_output_rows(old_rows: Tensor, pairs: Cooccurrence, combinations: Tensor) -> Tensor:
    """Output rows of the new tokens.

    How common a token is, is no linear matter; the difference goes along the common direction, as
    in ``rows.aligned_output_rows``.

    Args:
        old_rows: (old vocabulary, hidden), any float dtype.
        pairs: the co-occurrence.
        combinations: of ``sparse_combinations``.

    Returns:
        (new vocabulary, hidden) float32.
    """
    _, overall = old_token_shares(pairs)
    expected = _combined(log_shares(overall)[:, None], pairs, combinations)[:, 0]
    rows = _combined(old_rows.float(), pairs, combinations)
    return rows.addr_(new_log_shares(pairs) - expected, common_direction(old_rows, overall))


def _combined(table: Tensor, pairs: Cooccurrence, combinations: Tensor) -> Tensor:
    """``m + sum_a A[v, a] (table[a] - m)``, (new vocabulary, columns) float32."""
    _, overall = old_token_shares(pairs)
    mean = overall @ table
    rest = 1 - torch.sparse.sum(combinations, dim=1).to_dense()
    return torch.sparse.mm(combinations, table).addr_(rest, mean)
