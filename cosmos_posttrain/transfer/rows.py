"""Input embeddings and output rows of new tokens, from those of old tokens and their overlaps.

Flows in: a checkpoint's rows and a ``Cooccurrence``. Flows out: rows of the new tokens. The maths
with its reasons is in docs/embedding_transfer.md.

    E_new[v] = mean + gain * (sum_o Q(o|v) E_old[o] - mean)        input embeddings
    W_new[v] = sum_o Q(o|v) W_old[o] + b[v] u                      output rows

Q(o|v) is the share of old token o in the volume of new token v, drawn towards the shares P(o) of
all old tokens where v was seen a few times only: Q(o|v) = (n P(o|v) + k P(o)) / (n + k). b[v] is
log P(v) less the expected log P(o): how common v is, compared with the old tokens that it is made
of. The output layer has no bias, so it goes along u, a direction in which hidden states lie near 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_posttrain.transfer.cooccurrence import Cooccurrence

# As many sightings of a token weigh as much as what is known without any (k above).
PRIOR_SIGHTINGS = 10.0
# The gain undoes what averaging takes away; beyond this it would only amplify noise.
MAX_GAIN = 10.0
# A share of this many sightings is added to every token, so that log P(v) exists for all of them.
SMOOTHING = 0.5
# Ridge of the common direction, in mean squared lengths of the old output rows along an axis.
RIDGE = 1.0


def pair_volumes(pairs: Cooccurrence) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of N pairs the new and the old token (N,) int64 and C[v, o]; and its sums C[v], C[o].

    Returns:
        Volumes are float64; the sums have a number for every token of the vocabulary.
    """
    new = torch.from_numpy(pairs.new_tokens).long()
    old = torch.from_numpy(pairs.old_tokens).long()
    volumes = torch.from_numpy(pairs.volumes).double()
    by_new = volumes.new_zeros(pairs.new.vocab_size).index_add_(0, new, volumes)
    by_old = volumes.new_zeros(pairs.old.vocab_size).index_add_(0, old, volumes)
    return new, old, volumes, by_new, by_old


def trust_in(pairs: Cooccurrence) -> Tensor:
    """How much is known of each new token, n / (n + k): (new vocabulary,) float64."""
    seen = torch.from_numpy(pairs.occurrences).double()
    return seen / (seen + PRIOR_SIGHTINGS)


def old_token_shares(pairs: Cooccurrence) -> tuple[Tensor, Tensor]:
    """Q(o|v), and P(o).

    Returns:
        (new vocabulary, old vocabulary) sparse float32 without the part that all rows share, and
        (old vocabulary,) float32. A row v of the first adds up to n / (n + k).
    """
    new, old, volumes, by_new, by_old = pair_volumes(pairs)
    values = (volumes * (trust_in(pairs) / by_new.clamp(min=1e-30))[new]).float()
    sparse = torch.sparse_coo_tensor(
        torch.stack([new, old]),
        values,
        (pairs.new.vocab_size, pairs.old.vocab_size),
        is_coalesced=True,
        check_invariants=True,
    )
    return sparse, (by_old / by_old.sum()).float()


def _averaged(old_rows: Tensor, pairs: Cooccurrence) -> tuple[Tensor, Tensor]:
    """``sum_o Q(o|v) row[o]`` (new vocabulary, hidden) float32, and ``sum_o P(o) row[o]``."""
    shares, overall = old_token_shares(pairs)
    old_rows = old_rows.float()
    mean = overall @ old_rows
    rest = 1 - torch.sparse.sum(shares, dim=1).to_dense()
    return torch.sparse.mm(shares, old_rows).addcmul_(rest[:, None], mean[None]), mean


def prior_gap(pairs: Cooccurrence) -> Tensor:
    """b[v]: ``log P(v) - sum_o Q(o|v) log P(o)``, (new vocabulary,) float32."""
    shares, overall = old_token_shares(pairs)
    log_old = log_shares(overall)
    expected = torch.sparse.mm(shares, log_old[:, None])[:, 0]
    expected += (1 - torch.sparse.sum(shares, dim=1).to_dense()) * (overall @ log_old)
    return new_log_shares(pairs) - expected


def new_log_shares(pairs: Cooccurrence) -> Tensor:
    """Log P(v), (new vocabulary,) float32."""
    seen = torch.from_numpy(pairs.occurrences).float() + SMOOTHING
    return (seen / seen.sum()).log()


def log_shares(overall: Tensor) -> Tensor:
    """Log P(o); a token that was never seen counts as seen once in a million."""
    return overall.clamp(min=1e-6).log()


def common_direction(old_rows: Tensor, overall: Tensor) -> Tensor:
    """u: a vector whose product with hidden states lies near 1, from the output rows alone.

    Hidden states have a large part in common, with which the output layer tells how common each
    token is. It is found by ridge regression: the h for which ``old_rows @ h`` comes closest to
    ``log P(o)`` up to a constant, weighted by P(o). Then ``u = h / |h|^2``.

    Args:
        old_rows: (old vocabulary, hidden), any float dtype.
        overall: (old vocabulary,) P(o).

    Returns:
        (hidden,) float32.
    """
    rows = old_rows.float()
    rows = rows - overall @ rows
    log_old = log_shares(overall)
    weighted = rows.T * overall
    moments = weighted @ rows
    moments.diagonal().add_(RIDGE * moments.diagonal().mean())
    common = torch.linalg.solve(moments, weighted @ (log_old - overall @ log_old))
    return common / common.square().sum().clamp(min=1e-12)


def aligned_output_rows(old_rows: Tensor, pairs: Cooccurrence) -> Tensor:
    """Output rows of the new tokens.

    Their logits are the old logits averaged over Q(o|v), and b[v]: the largest lower bound of
    ``log sum_o P(v|o) p(o|h)`` for a fixed Q, and linear in the hidden state h.

    Args:
        old_rows: (old vocabulary, hidden), any float dtype.
        pairs: the co-occurrence.

    Returns:
        (new vocabulary, hidden) float32.
    """
    _, overall = old_token_shares(pairs)
    direction = common_direction(old_rows, overall)
    return torch.addr(_averaged(old_rows, pairs)[0], prior_gap(pairs), direction)


def aligned_input_rows(old_rows: Tensor, pairs: Cooccurrence) -> Tensor:
    """Input embeddings of the new tokens.

    A mean of many rows lies closer to their common mean than they do, so the layers would hear the
    tokens less than they are used to. One gain for all rows restores the mean square distance.

    Args:
        old_rows: (old vocabulary, hidden), any float dtype.
        pairs: the co-occurrence.

    Returns:
        (new vocabulary, hidden) float32.
    """
    rows, mean = _averaged(old_rows, pairs)
    _, overall = old_token_shares(pairs)
    seen = torch.from_numpy(pairs.occurrences).float()
    before = overall @ (old_rows.float() - mean).square().sum(1)
    after = (seen / seen.sum()) @ (rows - mean).square().sum(1)
    gain = float((before / after.clamp(min=1e-30)).sqrt().clamp(max=MAX_GAIN))
    return mean + gain * (rows - mean)
