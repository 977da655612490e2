"""Random numbers by place: each is a pure function of where it is used.

Flows in: a seed, the number of an item in its list, of a sample, and positions. Flows out: Gumbel
numbers for tokens that could stand there, the same for every batch size, tensor parallel size
and way of decoding, on every device (up to rounding of the logarithm).

    bits = splitmix64(key of (seed, item, sample, position), token)    counter-based, no state

SplitMix64 (Steele, Lea, Flood, 2014, "Fast splittable pseudorandom number generators") started at a
key; the key is the seed and the numbers, each mixed in by the same finalizer.
"""

from __future__ import annotations

from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - 2**64  # the golden ratio in 64 bits, as torch's signed integers
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right; torch's own keeps the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer; products wrap around."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def stream_keys(seeds: Tensor, items: Tensor, samples: Tensor) -> Tensor:
    """A key for every clip that is generated.

    Args:
        seeds: (B,) int64, of the run, at least 0.
        items: (B,) int64, number of each clip's input in its list; 0 alone.
        samples: (B,) int64, number of the sample of that input.

    Returns:
        (B,) int64.
    """
    key = _mixed(seeds + _STEP)
    return _mixed(_mixed(key + _STEP * (items + 1)) + _STEP * (samples + 1))


def gumbel(keys: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel numbers ``-log(-log u)`` for some tokens at some positions of some clips.

    Args:
        keys: (B,) int64, see ``stream_keys``.
        positions: (N,) or (B, N) int64, places in the clip.
        tokens: (V,) or (B, N, V) int64.

    Returns:
        (B, N, V) float32; the largest possible number is 22.2.
    """
    places = _mixed(keys[:, None] + _STEP * (positions + 1))
    bits = _mixed(places[..., None] + (tokens + 1) * _STEP)
    # 1 - u from 31 bits: its smallest values, which make the largest numbers, are the finest.
    rest = _shifted(bits, 33).float().mul_(2.0**-31).add_(2.0**-32)
    return rest.neg_().log1p_().neg_().log_().neg_()
