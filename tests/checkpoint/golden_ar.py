"""The autoregressive golden cases, and small folders made from them."""

from __future__ import annotations

from pathlib import Path

import torch
from reference import GOLDEN_DIR
from safetensors.torch import load_file

CASES = ("base_4b_like", "base_12b_like")

# The same float32 arithmetic in another order of sums: 2e-6 was measured, logits reach about 3.
LOGIT_TOLERANCE = 1e-5


def case_dir(name: str) -> Path:
    return GOLDEN_DIR / "ar" / name


def case_io(name: str) -> dict[str, torch.Tensor]:
    return load_file(case_dir(name) / "io.safetensors")


def weights(name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(case_dir(name) / "model.pt", weights_only=True)
    return state


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
