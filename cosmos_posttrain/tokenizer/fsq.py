"""Finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505).

Flows in: a latent vector of one number per level. Flows out: each number rounded to one of its
level's values, and the index of the combination, mixed radix with the first level fastest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_EPSILON = 1e-3


class FSQ(nn.Module):
    """The quantizer: bounds, rounds, and numbers. Computes in float32 whatever its input is.

    Attributes:
        levels: values per channel, such as (8, 8, 8, 5, 5, 5).
        vocab_size: their product.
    """

    half_range: Tensor
    offset: Tensor
    shift: Tensor
    width: Tensor
    _levels: Tensor
    _basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(int(level) for level in levels)
        self.vocab_size = math.prod(self.levels)
        count = torch.tensor(self.levels, dtype=torch.int32)
        half = (count - 1) * (1 + _EPSILON) / 2
        offset = torch.where(count % 2 == 0, 0.5, 0.0)
        basis = torch.cumprod(torch.tensor([1, *self.levels[:-1]]), dim=0).to(torch.int32)
        buffers = {
            "half_range": half,
            "offset": offset,
            "shift": torch.atanh(offset / half),
            "width": (count // 2).float(),
            "_levels": count,
            "_basis": basis,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Moves with the network but stays in float32: rounding in bf16 would merge codes."""
        super()._apply(fn, recurse)
        for name in ("half_range", "offset", "shift", "width"):
            buffer = getattr(self, name)
            if buffer.dtype != torch.float32:
                fresh = getattr(FSQ(self.levels), name)
                setattr(self, name, fresh.to(buffer.device))
        return self

    def bound(self, latents: Tensor) -> Tensor:
        """Squashes (..., D) so that rounding gives exactly ``levels`` values per channel."""
        return torch.tanh(latents.float() + self.shift) * self.half_range - self.offset

    def quantize(self, latents: Tensor) -> Tensor:
        """(..., D) -> codes (..., D) float32 in [-1, 1]; gradients pass straight through."""
        bounded = self.bound(latents)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self.width

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Codes (..., D) -> indices (...) int32."""
        digits = torch.round(codes.float() * self.width + self.width).to(torch.int32)
        return (digits * self._basis).sum(dim=-1, dtype=torch.int32)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Indices (...) int -> codes (..., D) float32 in [-1, 1]."""
        quotient = torch.div(indices[..., None].int(), self._basis, rounding_mode="floor")
        digits = torch.remainder(quotient, self._levels)
        return (digits.float() - self.width) / self.width
