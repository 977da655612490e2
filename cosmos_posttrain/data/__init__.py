"""Prepared data, read: contract and manifest, and clips as token sequences for training.

Flows in: folders that preparation wrote. Flows out: ``Manifest``; ``TokenDataset`` of clips as
token sequences, with where each came from; ``ClipSampler``, their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.manifest import DocumentRow, Manifest

if TYPE_CHECKING:
    from cosmos_posttrain.data.dataset import TokenDataset
    from cosmos_posttrain.data.sampler import ClipSampler

__all__ = ["ClipSampler", "Contract", "DocumentRow", "Manifest", "TokenDataset"]


def __getattr__(name: str) -> Any:
    """Imports torch and megatron only when clips are really read."""
    if name == "TokenDataset":
        from cosmos_posttrain.data.dataset import TokenDataset

        return TokenDataset
    if name == "ClipSampler":
        from cosmos_posttrain.data.sampler import ClipSampler

        return ClipSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
