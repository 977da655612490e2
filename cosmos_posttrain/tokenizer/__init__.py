"""Discrete video tokenizers: video in, a grid of token indices out, and back.

Flows in: clips (B, 3, T, H, W) in [-1, 1] and a path to weights (native folder, TorchScript,
Hugging Face id, or a shipped name). Flows out: indices (B, t, h, w) int32, or decoded clips.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_posttrain.tokenizer.loading import load_tokenizer, load_tokenizer_pair
    from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer

from cosmos_posttrain.tokenizer.shipped import SHIPPED

__all__ = ["SHIPPED", "VideoTokenizer", "load_tokenizer", "load_tokenizer_pair"]


def __getattr__(name: str) -> Any:
    """Imports torch only when a tokenizer is really used."""
    if name in ("load_tokenizer", "load_tokenizer_pair"):
        from cosmos_posttrain.tokenizer import loading

        return getattr(loading, name)
    if name == "VideoTokenizer":
        from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer

        return VideoTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
