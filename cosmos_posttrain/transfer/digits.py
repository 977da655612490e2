"""Rows of new tokens from the digits of their FSQ codes alone: no clips, no co-occurrence.

Flows in: a checkpoint's rows and both tokenizers' levels. Flows out: rows of the new tokens.

A code is one number in [-1, 1] for each channel of the tokenizer, one of as many as the channel has
levels: its digit. The old rows are fitted by ridge regression to functions of one digit and of two,
and the fit is read off at the new tokens' digits. Where a channel's levels differ, a new digit lies
between two old ones and takes of both (by linear interpolation).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_posttrain.tokenizer.fsq import FSQ

# Ridge, in tokens: an effect that so many old tokens speak of counts half.
PRIOR_TOKENS = 10.0


def digit_shares(levels: Sequence[int], old_levels: Sequence[int]) -> list[Tensor]:
    """Which old digits each token's digits are.

    Args:
        levels: of the tokens' tokenizer.
        old_levels: of the tokenizer whose digits are wanted; as many.

    Returns:
        For each channel (vocabulary, old levels of the channel) float32, rows that add up to 1.
    """
    fsq = FSQ(levels)
    codes = fsq.indices_to_codes(torch.arange(fsq.vocab_size)).unbind(1)
    shares = []
    for code, count in zip(codes, old_levels, strict=True):
        old_codes = FSQ([count]).indices_to_codes(torch.arange(count))[:, 0]
        spacing = 1 / (count // 2) if count > 1 else 1.0
        hats = 1 - (code.clamp(old_codes[0], old_codes[-1])[:, None] - old_codes).abs() / spacing
        shares.append(hats.clamp(min=0))
    return shares


def features(levels: Sequence[int], old_levels: Sequence[int]) -> Tensor:
    """Shares of the old digits, and their products for every two channels.

    Returns:
        (vocabulary, features) float32; 667 features for the levels 8, 8, 8, 5, 5, 5.
    """
    single = digit_shares(levels, old_levels)
    pairs = [
        (first[:, :, None] * second[:, None]).flatten(1)
        for first, second in itertools.combinations(single, 2)
    ]
    return torch.cat([*single, *pairs], 1)


def digit_rows(old_rows: Tensor, old_levels: Sequence[int], new_levels: Sequence[int]) -> Tensor:
    """Rows of the new tokens, input embeddings or output rows.

    Args:
        old_rows: (old vocabulary, hidden), any float dtype.
        old_levels: FSQ levels of the checkpoint's tokenizer.
        new_levels: of the new one, as many.

    Returns:
        (new vocabulary, hidden) float32.
    """
    rows = old_rows.float()
    mean = rows.mean(0)
    known = features(old_levels, old_levels)
    average = known.mean(0)
    known -= average
    moments = known.T @ known
    moments.diagonal().add_(PRIOR_TOKENS)
    effects = torch.linalg.solve(moments, known.T @ rows)
    del known
    wanted = features(new_levels, old_levels)
    wanted -= average
    return torch.addmm(mean, wanted, effects)
