"""One token out of the scores of all.

Flows in: logits (B, N, V), and Gumbel numbers of the places that they belong to (``noise.py``).
Flows out: tokens (B, N).

    token = argmax(logits / temperature + gumbel) over the tokens that may be drawn

which is a draw from ``softmax(logits / temperature)`` over them (Gumbel-max; Maddison et al., 2014,
arXiv:1411.0030). A token is thus a function of logits and place alone, whoever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.inference.noise import gumbel

# Gumbel numbers (B, N, V) of tokens, (V,) or (B, N, V), at the places of some scores.
Numbers = Callable[[Tensor], Tensor]

# So many of the most likely tokens are looked at first, and so many times more if that is too few.
_FIRST_CANDIDATES, _MORE_CANDIDATES = 256, 8
# On a GPU: chance at most, in powers of e, that none of the best scores may be drawn, how many are
# looked at, and masses that are compared at once, at most.
_LOG_MISS = -40.0
_MAX_BEST = 256
_MAX_MASSES = 2**26


def check_sampling(temperature: float, top_p: float | None, top_k: int | None) -> None:
    """Refuses settings that mean nothing.

    Raises:
        ConfigError: names the value and the range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            f"temperature {temperature} must be a number of at least 0; 0 takes the most likely "
            "token, 1.0 the model's own distribution."
        )
    if top_p is not None and not 0 <= top_p <= 1:
        raise ConfigError(f"top_p {top_p} must lie in [0, 1]; 1.0 keeps all tokens, try 0.8.")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k {top_k} must be at least 1; leave it out to keep all tokens.")


def check_guidance(guidance_scale: float, has_negative: bool) -> None:
    """Refuses a guidance that means nothing.

    Raises:
        ConfigError: names the value and the rule.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ConfigError(
            f"guidance_scale {guidance_scale} must be a number of at least 0; 1.0 is the model as "
            "it is, above it the text counts for more."
        )
    if has_negative and guidance_scale == 1:
        raise ConfigError(
            "a negative prompt has no effect at guidance_scale 1; leave it out, or give a scale "
            "above 1."
        )


def guide(logits: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598, equation 6).

    Args:
        logits: (2 B, ...): of the text, then of the null or negative text.
        guidance_scale: the paper's w + 1: 0 is the other text alone, 1 the text alone.

    Returns:
        (B, ...) float32.
    """
    given, other = logits.float().chunk(2)
    return other + guidance_scale * (given - other)


def choose(
    logits: Tensor,
    numbers: Numbers,
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
    can_wait: bool = True,
) -> Tensor:
    """Draws one token for each row of scores.

    A token may be drawn where the tokens that are more likely than it hold at most ``top_p`` of the
    probability (nucleus sampling, Holtzman et al., 2020, arXiv:1904.09751) and are fewer than
    ``top_k``; the most likely one always may.

    Args:
        logits: (B, N, V).
        numbers: Gumbel numbers; not asked for at temperature 0.
        temperature: 0 takes the most likely token.
        top_p: None keeps all, as 1 does.
        top_k: None keeps all.
        can_wait: whether the host may wait for what was found; without, a GPU can do all at once.

    Returns:
        (B, N) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Less its maximum first: a tiny temperature must not overflow.
    scaled = (logits.float() - logits.amax(-1, keepdim=True)) / temperature
    if top_p == 1.0:
        top_p = None
    if top_p is None and top_k is None:
        return (scaled + numbers(_all_tokens(logits))).argmax(-1)
    # A window is waited for in any case, but where the whole pass is one graph.
    if not can_wait or (logits.is_cuda and logits.shape[-2] == 1):
        return choose_by_score(scaled, numbers, top_p, top_k)
    return choose_by_likelihood(scaled, numbers, top_p, top_k)


def choose_by_likelihood(
    scaled: Tensor, numbers: Numbers, top_p: float | None, top_k: int | None
) -> Tensor:
    """Looks at the most likely tokens only, as many as may be drawn; nothing is made of the others.

    For the CPU: it asks what it has found before it goes on.

    Args:
        scaled: (B, N, V) float32, largest 0.
        numbers: see ``choose``, as the others.
        top_p: see there.
        top_k: see there.
    """
    size = scaled.shape[-1]
    total = scaled.exp().sum(-1, keepdim=True)
    count = min(size, _FIRST_CANDIDATES if top_k is None else min(top_k + 1, _FIRST_CANDIDATES))
    while True:
        found = scaled.topk(count, -1)
        mass = found.values.exp() / total
        # Number and mass of those that are strictly more likely; equal ones are treated alike.
        first = torch.searchsorted(-found.values, -found.values)
        before = (mass.cumsum(-1) - mass).gather(-1, first)
        keep = torch.ones_like(before, dtype=torch.bool)
        if top_p is not None:
            keep = before <= top_p
        if top_k is not None:
            keep &= first < top_k
        keep[..., 0] = True
        if count == size or not bool(keep[..., -1].any()):
            break
        count = min(size, count * _MORE_CANDIDATES)
    width = int(keep.sum(-1).max())  # what is kept comes first
    tokens = found.indices[..., :width]
    scores = found.values[..., :width] + numbers(tokens)
    best = scores.masked_fill_(~keep[..., :width], -math.inf).argmax(-1, keepdim=True)
    return tokens.gather(-1, best).squeeze(-1)


def choose_by_score(
    scaled: Tensor, numbers: Numbers, top_p: float | None, top_k: int | None
) -> Tensor:
    """Looks at the best scores, one of which may be drawn; nothing is asked on the way.

    For the GPU. What may be drawn holds more than ``top_p``, so that one after another, each of the
    best scores belongs to it with at least this probability.

    Args:
        scaled: (B, N, V) float32, largest 0.
        numbers: see ``choose``, as the others.
        top_p: see there.
        top_k: see there.
    """
    size = scaled.shape[-1]
    masses = torch.softmax(scaled, -1)
    if top_k is not None and top_k < size:
        smallest = scaled.topk(top_k, -1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < smallest, -math.inf)
    scores = scaled + numbers(_all_tokens(scaled))
    if top_p is None:
        return scores.argmax(-1)
    count = size
    if top_k is None and top_p > 0:
        count = min(size, math.ceil(_LOG_MISS / math.log1p(-top_p)))
    if count > _MAX_BEST:  # few tokens hold so little: look at the most likely ones instead
        return _choose_sorted(scores, masses, top_p)
    best = scores.topk(count, -1).indices
    parts = masses.gather(-1, best).split(max(1, _MAX_MASSES // masses.numel()), -1)
    keep = torch.cat([_likelier_mass(masses, part) for part in parts], -1) <= top_p
    # The first of them; argmax of equal values may be any.
    order = torch.arange(count, 0, -1, device=keep.device)
    return best.gather(-1, (keep * order).argmax(-1, keepdim=True)).squeeze(-1)


def _likelier_mass(masses: Tensor, own: Tensor) -> Tensor:
    """What the tokens hold (B, N, V) that are likelier than some: (B, N, K) to (B, N, K)."""
    likelier = masses[..., None, :] > own[..., None]
    return (masses[..., None, :] * likelier).sum(-1)


def _choose_sorted(scores: Tensor, masses: Tensor, top_p: float) -> Tensor:
    found = masses.sort(-1, descending=True)
    before = found.values.cumsum(-1) - found.values
    first = torch.searchsorted(-found.values, -found.values)
    keep = before.gather(-1, first) <= top_p
    keep[..., 0] = True
    kept = scores.gather(-1, found.indices).masked_fill(~keep, -math.inf)
    return found.indices.gather(-1, kept.argmax(-1, keepdim=True)).squeeze(-1)


def _all_tokens(logits: Tensor) -> Tensor:
    return torch.arange(logits.shape[-1], device=logits.device)


@dataclass(frozen=True)
class Draw:
    """How tokens of some clips are drawn.

    Attributes:
        keys: (B,) int64, see ``stream_keys``.
        prefix: tokens before the clip's own (``<bov>``), which are no places of it.
        temperature: see ``choose``, as the next two.
        top_p: see there.
        top_k: see there.
        can_wait: see there.
    """

    keys: Tensor
    prefix: int = 0
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    can_wait: bool = True

    def __call__(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Draws the tokens at some places.

        Args:
            scores: (B, N, V), of the same places.
            positions: (N,) or (B, N) int64, in the sequence.

        Returns:
            (B, N) int64.
        """
        return choose(
            scores,
            lambda tokens: gumbel(self.keys, positions - self.prefix, tokens),
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            can_wait=self.can_wait,
        )
