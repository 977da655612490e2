"""Prepared data, read: contract and manifest, and clips as token sequences for training.

Flows in: folders that preparation wrote. Flows out: ``Manifest``; ``TokenDataset`` of clips as
token sequences, with where each came from; ``ClipSampler``, their order.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cosmos_posttrain.data.contract import Contract

if TYPE_CHECKING:
    from cosmos_posttrain.data.dataset import TokenDataset
    from cosmos_posttrain.data.manifest import DocumentRow, Manifest
    from cosmos_posttrain.data.sampler import ClipSampler

__all__ = ["ClipSampler", "Contract", "DocumentRow", "Manifest", "TokenDataset"]

_FILES = {
    "ClipSampler": "sampler",
    "DocumentRow": "manifest",
    "Manifest": "manifest",
    "TokenDataset": "dataset",
}


def __getattr__(name: str) -> Any:
    """Imports numpy, torch and megatron only where they are needed: not for the contract."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
