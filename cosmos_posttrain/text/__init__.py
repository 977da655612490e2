"""Text encoders: prompts in, rows of embeddings out, to which a Video2World model attends.

Flows in: prompts, and a path to a T5 encoder (folder, Hugging Face id, or ``tiny``). Flows out: for
each prompt (length, width), or all of them padded with zero rows to (B, context_len, width).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_posttrain.text.loading import load_text_encoder
    from cosmos_posttrain.text.text_encoder import TextEncoder

__all__ = [
    "DEFAULT_TEXT_ENCODER",
    "SHIPPED",
    "TEXT_ENCODER_DTYPES",
    "TextEncoder",
    "load_text_encoder",
]

# What the published Video2World models were trained with, at the commit that other projects which
# run these models pin too.
DEFAULT_TEXT_ENCODER = "google-t5/t5-11b@90f37703b3334dfe9d2b009bfcbfbf1ac9d28ea3"
# In this package; random weights.
SHIPPED = ("tiny",)
# Not float16, in which T5's activations overflow.
TEXT_ENCODER_DTYPES = ("bfloat16", "float32")


def __getattr__(name: str) -> Any:
    """Imports torch only when a text encoder is really used."""
    if name == "load_text_encoder":
        from cosmos_posttrain.text.loading import load_text_encoder

        return load_text_encoder
    if name == "TextEncoder":
        from cosmos_posttrain.text.text_encoder import TextEncoder

        return TextEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
