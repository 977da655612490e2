"""NeMo 2's trainer around this package's model, data and checkpoints; optional.

Flows in: a ``TrainConfig``, or the class names in a NeMo checkpoint's ``context``. Flows out: a run
by ``nemo.collections.llm``, in the run folder that the direct engine writes too. Nothing here is
needed elsewhere, and every file can be imported where NeMo is missing: ``extra.check`` then says
what to install. docs/nemo.md says why each thing is as it is.
"""

from __future__ import annotations

from typing import Any

# The names that NeMo checkpoints know; see checkpoint/nemo_context.py.
_CLASSES = {"CosmosConfig": "config", "CosmosModel": "model"}


def __getattr__(name: str) -> Any:
    if name not in _CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_CLASSES[name]}"), name)
