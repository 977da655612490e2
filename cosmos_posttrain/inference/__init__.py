"""From an image or the first frames of a video to the rest of the clip.

Flows in: a model, a tokenizer and input frames. Flows out: tokens drawn one at a time with a KV
cache, decoded to an mp4.

Modules: ``session`` holds a model and its tokenizer and answers ``request``s, ``opening`` finds out
which they are and ``contract`` whether they belong together; ``stacking`` makes one batch of some
requests and ``rollout`` one clip of several chunks; ``engine`` draws tokens one after another,
``sampling`` one; ``batch`` is a run of ``infer.py``: ``inputs`` says what it makes, ``making``
makes it, ``outputs`` writes it, ``config`` has its settings and flags.
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
