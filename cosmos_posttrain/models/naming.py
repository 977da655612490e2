"""Names of a model's parameters: in memory on this rank, and on disk.

Flows in: a module of either layer spec, on any pipeline stage. Flows out: its parameters under the
names on disk (Transformer Engine's names for norms, global layer numbers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from cosmos_posttrain.models.chunks import chunks_of
from cosmos_posttrain.models.specs import NAMES_ON_DISK

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def parameters_by_disk_name(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (name on disk, parameter) for every parameter that this rank holds."""
    for chunk in chunks_of(model):
        for name, parameter in chunk.named_parameters():
            yield _on_disk(name, chunk.decoder), parameter


def _on_disk(name: str, decoder: Any) -> str:
    match = _LAYER.fullmatch(name)
    if match is None:
        return name
    layer = decoder.layers[int(match[1])]
    rest = match[2]
    for in_memory, on_disk in NAMES_ON_DISK.items():
        if rest.startswith(in_memory):
            rest = on_disk + rest[len(in_memory) :]
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"
