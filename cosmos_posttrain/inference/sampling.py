"""One token out of the scores of all.

Flows in: logits (..., V) and a Gumbel number for every one of them (``noise.py``). Flows out:
tokens (...).

    token = argmax(logits / temperature + gumbel) over the tokens that may be drawn

which is a draw from ``softmax(logits / temperature)`` over them (Gumbel-max; Maddison et al., 2014,
arXiv:1411.0030). A token is thus a function of logits and place alone, whoever computes it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.inference.noise import gumbel

# Each round leaves about half of the mass; what is left after so many is a token of its own.
_MAX_ROUNDS = 64


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
        logits: (2 B, V) float32: of the text, then of the null or negative text.
        guidance_scale: the paper's w + 1: 0 is the other text alone, 1 the text alone.

    Returns:
        (B, V).
    """
    given, other = logits.chunk(2)
    return other + guidance_scale * (given - other)


def choose(
    logits: Tensor,
    gumbel: Tensor | None,
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Draws one token for each row of scores.

    A token may be drawn where the tokens that are more likely than it hold at most ``top_p`` of the
    probability (nucleus sampling, Holtzman et al., 2020, arXiv:1904.09751) and are fewer than
    ``top_k``; the most likely one always may. Nothing is sorted: the best of all tokens is looked
    at, and where it may not be drawn, neither may any that is less likely, so the best of those
    that are more likely comes next. Few rounds are needed, since each leaves about half.

    Args:
        logits: (..., V) float32.
        gumbel: (..., V) float32; None at temperature 0.
        temperature: 0 takes the most likely token.
        top_p: None keeps all, as 1 does.
        top_k: None keeps all.

    Returns:
        (...) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    assert gumbel is not None
    # Less its maximum first: a tiny temperature must not overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature
    scores = scaled + gumbel
    best = scores.argmax(-1)
    if top_p in (None, 1.0) and top_k is None:
        return best
    probabilities = torch.softmax(scaled, -1)
    for _ in range(_MAX_ROUNDS):
        likelier = probabilities > probabilities.gather(-1, best[..., None])
        refused = torch.zeros_like(best, dtype=torch.bool)
        if top_p is not None:
            refused |= (probabilities * likelier).sum(-1) > top_p
        if top_k is not None:
            refused |= likelier.sum(-1) >= top_k
        if not refused.any():
            break
        scores = scores.where(likelier | ~refused[..., None], -math.inf)
        best = scores.argmax(-1)
    else:
        return torch.where(refused, logits.argmax(-1), best)
    return best


@dataclass(frozen=True)
class Draw:
    """How tokens of some clips are drawn.

    Attributes:
        keys: (B,) int64, see ``stream_keys``.
        prefix: tokens before the clip's own (``<bov>``), which are no places of it.
        temperature: see ``choose``, as the next two.
        top_p: see there.
        top_k: see there.
    """

    keys: Tensor
    prefix: int = 0
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None

    def row(self, number: int) -> Draw:
        """For one of the clips alone."""
        return dataclasses.replace(self, keys=self.keys[number : number + 1])

    def __call__(self, scores: Tensor, position: int) -> Tensor:
        """Draws the tokens at some places in a row.

        Args:
            scores: (B, N, V) float32.
            position: of the first of them in the sequence.

        Returns:
            (B, N) int64.
        """
        numbers = None
        if self.temperature > 0:
            first = position - self.prefix
            places = torch.arange(first, first + scores.shape[1], device=scores.device)
            numbers = gumbel(self.keys, places, scores.shape[-1])
        return choose(
            scores,
            numbers,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )
