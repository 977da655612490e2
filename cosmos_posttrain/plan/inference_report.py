"""What fits where when clips are generated: a table for people, JSON for machines.

Flows in: models. Flows out: text on standard output.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.plan.inference import (
    FRAMEWORK_BYTES,
    STORED,
    InferenceMemory,
    inference_memory,
)
from cosmos_posttrain.plan.memory import FRAGMENTATION
from cosmos_posttrain.plan.report import WIDTH

GPU_SIZES = (24.0, 40.0, 80.0)
_GIB = 2**30


def _rows(
    models: Mapping[str, ModelConfig], batch_size: int
) -> list[tuple[str, str, InferenceMemory]]:
    return [
        (name, stored, inference_memory(model, stored, batch_size))
        for name, model in models.items()
        for stored in STORED
    ]


def verdict(memory: InferenceMemory, gigabytes: float) -> str:
    """Whether it fits a GPU of so many GiB: ``yes``, ``offloaded`` or ``no``."""
    if memory.together <= gigabytes * _GIB:
        return "yes"
    return "offloaded" if memory.offloaded <= gigabytes * _GIB else "no"


def to_json(
    models: Mapping[str, ModelConfig], batch_size: int, sizes: Sequence[float]
) -> list[dict[str, Any]]:
    """The table as plain values; memory in bytes."""
    return [
        {
            "model": name,
            "weights_stored_as": stored,
            "batch_size": batch_size,
            "memory_bytes": {key: round(value) for key, value in dataclasses.asdict(memory).items()}
            | {"together": round(memory.together), "offloaded": round(memory.offloaded)},
            "fits": {f"{size:g}": verdict(memory, size) for size in sizes},
        }
        for name, stored, memory in _rows(models, batch_size)
    ]


def show(
    models: Mapping[str, ModelConfig], batch_size: int, sizes: Sequence[float], as_json: bool
) -> None:
    """Prints the table and its assumptions."""
    if as_json:
        print(json.dumps(to_json(models, batch_size, sizes), indent=2))
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    console = Console(width=WIDTH, highlight=False)
    title = f"generating {batch_size} clip(s) at a time on one GPU; GiB"
    table = Table(
        "model", "as", title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0)
    )
    for name in ("weights", "cache", "work", "tokenizer", "T5", "loading", "together", "offloaded"):
        table.add_column(name, justify="right", no_wrap=True)
    for size in sizes:
        table.add_column(f"{size:g} GB", justify="right", no_wrap=True)
    for name, stored, memory in _rows(models, batch_size):
        numbers = (*dataclasses.astuple(memory), memory.together, memory.offloaded)
        cells = [f"{value / _GIB:.1f}" if value else "" for value in numbers]
        table.add_row(name, stored, *cells, *(verdict(memory, size) for size in sizes))
    console.print(table)
    console.print(
        "together: nothing is offloaded; offloaded: every --offload_* flag, so that each stage has "
        f"the GPU to itself. Both with {FRAMEWORK_BYTES / _GIB:g} GiB for CUDA and "
        f"{FRAGMENTATION:.0%} for fragmentation. int8: --quantization int8, made matrix by "
        "matrix of weights that are read on the CPU. T5: T5-11B in bfloat16 "
        "(--text_encoder_dtype). Guidance doubles cache and work. All are estimates."
    )
