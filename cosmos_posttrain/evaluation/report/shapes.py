"""The figures of any evaluation, whatever their nesting: scalars, series and grids by their paths.

Flows in: the ``figures`` of a ``metrics.json``. Flows out: path -> number, list or grid; and which
part of a path is the quantity (``psnr``) and which says of what it is (``repeat_last``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_posttrain.evaluation.report.curves import is_number

Path = tuple[str, ...]

# Quantities of which lower is better, and higher.
LOWER = (
    *("nats_per_token", "bits_per_token", "perplexity", "top_500_cross_entropy", "cross_entropy"),
    *("lpips", "position_error", "sampson_error", "fvd", "rfvd", "failure_rate"),
)
HIGHER = ("psnr", "ssim", "top_1", "top_5", "top_500", "accuracy", "contrast", "diversity")
_NOISE = {"per_frame", "by_frame", "mean", "figures"}
_MAX_DEPTH = 6


def walk(figures: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value below an object, with its path."""
    if isinstance(figures, dict) and len(path) < _MAX_DEPTH:
        for key, value in figures.items():
            yield from walk(value, (*path, str(key)))
    else:
        yield path, figures


def scalars(figures: Any) -> dict[Path, float]:
    """The finite numbers."""
    return {path: value for path, value in walk(figures) if is_number(value)}


def series(figures: Any) -> dict[Path, list[float]]:
    """Lists of at least two numbers; what is missing in one is NaN."""
    return {
        path: [float(item) if is_number(item) else float("nan") for item in value]
        for path, value in walk(figures)
        if isinstance(value, list)
        and len(value) > 1
        and all(item is None or is_number(item) for item in value)
        and any(is_number(item) for item in value)
    }


def grid(value: Any) -> NDArray[np.float64] | None:
    """(H, W) numbers of a nested list, with NaN for null; None for anything else."""
    is_nested = isinstance(value, list) and value and all(isinstance(row, list) for row in value)
    if not is_nested or len({len(row) for row in value}) != 1 or not value[0]:
        return None
    if not all(item is None or is_number(item) for row in value for item in row):
        return None
    array = np.array([[np.nan if x is None else x for x in row] for row in value], np.float64)
    return array if np.isfinite(array).any() else None


def split(path: Path) -> tuple[str, str]:
    """(of what, quantity) of a path: the known quantity in it, else its last part."""
    parts = [part for part in path if part not in _NOISE] or list(path)
    known = next((part for part in reversed(parts) if is_known(part)), parts[-1])
    parts.remove(known)
    return " ".join(part for part in parts if part != "baselines"), known


def is_known(name: str) -> bool:
    """Whether it is known which of two values is better."""
    return name in LOWER or name in HIGHER
