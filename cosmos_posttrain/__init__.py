"""Post-training of the Cosmos autoregressive world models on another video tokenizer.

The Python API: ``load_tokenizer``, ``load_text_encoder``, ``load_model``, ``generate``,
``TokenDataset``. Names are imported when they are first used, so that importing the package is
instant and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import warning_filters as warning_filters

if TYPE_CHECKING:
    from cosmos_posttrain.checkpoint.load import load_model
    from cosmos_posttrain.data.dataset import TokenDataset
    from cosmos_posttrain.inference.engine import generate
    from cosmos_posttrain.text.loading import load_text_encoder
    from cosmos_posttrain.tokenizer.loading import load_tokenizer

__all__ = [
    "TokenDataset",
    "__version__",
    "generate",
    "load_model",
    "load_text_encoder",
    "load_tokenizer",
]

__version__ = "0.1.0"

_HOMES = {
    "load_tokenizer": "cosmos_posttrain.tokenizer.loading",
    "load_text_encoder": "cosmos_posttrain.text.loading",
    "load_model": "cosmos_posttrain.checkpoint.load",
    "generate": "cosmos_posttrain.inference.engine",
    "TokenDataset": "cosmos_posttrain.data.dataset",
}


def __getattr__(name: str) -> Any:
    """Imports the module behind a public name when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
