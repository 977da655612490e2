"""One token out of the scores of all.

Flows in: logits (B, V) and uniform random numbers (B,). Flows out: tokens (B,).

All randomness of a call is drawn at once from a seeded CPU generator, and each token is found from
its number by inverting the cumulative distribution. So every rank and every kind of device draws
the same token from the same logits, and nothing waits for the device between tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cosmos_posttrain.errors import ConfigError


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


def draw_uniform(batch_size: int, num_tokens: int, seed: int) -> Tensor:
    """The random numbers of a whole call, on the CPU.

    Returns:
        (B, N) float64 in [0, 1); clip by clip, so that the first clip's do not depend on B.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.rand(batch_size, num_tokens, dtype=torch.float64, generator=generator)


def keep_most_likely(probabilities: Tensor, top_p: float | None, top_k: int | None) -> Tensor:
    """Which of the sorted tokens may be drawn; the most likely one always may.

    Args:
        probabilities: (B, K) in descending order: all tokens, or the K most likely of them.
        top_p: keeps the tokens before which at most this mass lies (nucleus sampling, Holtzman et
            al., 2020, arXiv:1904.09751); None keeps all.
        top_k: keeps at most this many; None keeps all.

    Returns:
        (B, K) bool, true for a prefix of each row.
    """
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if top_p is not None:
        mass = probabilities.double()
        keep &= mass.cumsum(-1) - mass <= top_p
        keep[:, 0] = True
    if top_k is not None:
        keep[:, top_k:] = False
    return keep


def sample(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Draws one token a row.

    ``softmax(logits / temperature)``, cut by top_p and top_k, renormalised; the token is the first
    whose cumulative probability exceeds the row's random number. Temperature 0 is the argmax.

    Args:
        logits: (B, V) float32.
        uniform: (B,) float64 in [0, 1), on the logits' device; not used at temperature 0.
        temperature: at least 0.
        top_p: see ``keep_most_likely``.
        top_k: see ``keep_most_likely``.

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Less its maximum first: a tiny temperature must not overflow.
    shifted = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(shifted / temperature, -1)
    if top_k is not None and top_k < logits.shape[-1]:
        values, tokens = probabilities.topk(top_k, -1)
    elif top_p is not None and top_p < 1:
        values, tokens = probabilities.sort(-1, descending=True)
    else:
        values, tokens = probabilities, None
    if tokens is not None:
        keep = keep_most_likely(values, top_p, top_k)
        values = values.masked_fill(~keep, 0.0)
    cumulative = values.cumsum(-1, dtype=torch.float64)
    target = (uniform * cumulative[:, -1])[:, None]
    # Rounding may put the target at the very end, behind the last token that may be drawn.
    last = (values > 0).long().mul(torch.arange(values.shape[-1], device=values.device)).amax(-1)
    drawn = torch.searchsorted(cumulative, target, right=True).squeeze(-1).minimum(last)
    return drawn if tokens is None else tokens.gather(-1, drawn[:, None]).squeeze(-1)
