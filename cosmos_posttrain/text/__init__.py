"""Text encoders: prompts in, rows of embeddings out, to which a Video2World model attends.

Flows in: prompts, and a path to a T5 encoder (folder, Hugging Face id, or ``tiny``). Flows out: for
each prompt (length, width), or all of them padded with zero rows to (B, context_len, width).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cosmos_posttrain.text.shipped import DEFAULT_TEXT_ENCODER, SHIPPED, TEXT_ENCODER_DTYPES

if TYPE_CHECKING:
    from cosmos_posttrain.text.loading import identify_text_encoder, load_text_encoder
    from cosmos_posttrain.text.text_encoder import TextEncoder

__all__ = [
    "DEFAULT_TEXT_ENCODER",
    "SHIPPED",
    "TEXT_ENCODER_DTYPES",
    "TextEncoder",
    "identify_text_encoder",
    "load_text_encoder",
]


def __getattr__(name: str) -> Any:
    """Imports torch only when a text encoder is really used."""
    if name in ("identify_text_encoder", "load_text_encoder"):
        from cosmos_posttrain.text import loading

        return getattr(loading, name)
    if name == "TextEncoder":
        from cosmos_posttrain.text.text_encoder import TextEncoder

        return TextEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
