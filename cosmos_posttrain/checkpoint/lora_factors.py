"""LoRA's factors on disk, and what becomes of a weight when they are merged into it.

Flows in: a frozen weight and its factors, whole. Flows out: ``W + (alpha / rank) B A``, in the
weight's form and dtype.
"""

from __future__ import annotations

from torch import Tensor

from cosmos_posttrain.models.lora_config import LORA_A, LORA_B, LoraConfig

_GATED = "linear_fc1"  # its two branches lie one behind the other: B has an axis for them


def factor_names(name: str, lora: LoraConfig) -> tuple[str, str] | None:
    """Names on disk of the factors A and B beside a weight; None where it has none.

    Args:
        name: of the weight on disk.
        lora: the run's.
    """
    layer, _, kind = name.rpartition(".")
    if kind != "weight" or layer.rpartition(".")[2] not in lora.targets:
        return None
    return f"{layer}.{LORA_A}", f"{layer}.{LORA_B}"


def factor_shapes(
    name: str, weight: tuple[int, ...], lora: LoraConfig
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B beside a weight of shape (outputs, inputs)."""
    outputs, inputs = weight
    if f".{_GATED}." in name:
        return (lora.rank, inputs), (2, outputs // 2, lora.rank)
    return (lora.rank, inputs), (outputs, lora.rank)


def merged(weight: Tensor, a: Tensor, b: Tensor, lora: LoraConfig) -> Tensor:
    """``W + (alpha / rank) B A``, computed in float32 (float64 of float64) and rounded once.

    Args:
        weight: (outputs, inputs).
        a: (rank, inputs).
        b: (outputs, rank), or (parts, outputs / parts, rank).
        lora: gives the scale.
    """
    wide = weight.double() if weight.itemsize > 4 else weight.float()
    rows, columns = b.flatten(0, -2).to(wide.dtype), a.to(wide.dtype)
    return wide.addmm(rows, columns, alpha=lora.scale).to(weight.dtype)
