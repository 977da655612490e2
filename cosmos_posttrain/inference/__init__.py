"""From an image or the first frames of a video to the rest of the clip.

Flows in: a model, a tokenizer and input frames. Flows out: tokens drawn one at a time with a KV
cache, decoded to an mp4.

Modules: ``sampling`` draws a token from logits, ``engine`` draws many, ``contract`` says whether
model, tokenizer and clip belong together, ``plan`` checks a whole run before anything heavy is
loaded, ``pipeline`` carries it out, ``config`` holds its settings and flags.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_posttrain.inference.engine import generate

__all__ = ["generate"]


def __getattr__(name: str) -> Any:
    """Imports torch and megatron only when tokens are really generated."""
    if name == "generate":
        from cosmos_posttrain.inference.engine import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
