"""``--data_path``: one data set, or several with their shares. No torch.

Flows in: ``A``, ``A,B`` or ``A:0.7,B:0.3``, in YAML also a list of these. Flows out: the paths, and
the shares where they are given.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

from cosmos_posttrain.errors import ConfigError

_FORM = "write A, A,B or A:0.7,B:0.3, in YAML also as a list"


@dataclass(frozen=True)
class DataPaths:
    """Where the data lies.

    Attributes:
        paths: folders or prefixes.
        weights: share of each among the samples, in their ratio; None takes all clips alike.
    """

    paths: tuple[str, ...]
    weights: tuple[float, ...] | None = None

    def __str__(self) -> str:
        return ",".join(self.paths)


def parse_data_path(value: Any) -> DataPaths:
    """Reads the setting.

    What exists under the whole text is one path, whatever commas and colons are in it.

    Raises:
        ConfigError: it is malformed, a share is not above 0, only some have one, or a path is
            there twice.
    """
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if not items or not all(isinstance(item, str) for item in items):
        raise ConfigError(f"--data_path {value!r} is no path; {_FORM}.")
    if isinstance(value, str) and not os.path.exists(value):
        items = value.split(",")
    found = [_split(item.strip()) for item in items]
    paths, weights = tuple(path for path, _ in found), [weight for _, weight in found]
    if not all(paths) and len(paths) > 1:
        raise ConfigError(f"--data_path {value} has an empty entry; {_FORM}.")
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ConfigError(f"--data_path {value} names a data set twice; give it a larger share.")
    given = [weight for weight in weights if weight is not None]
    if any(not (0 < weight < math.inf) for weight in given):
        raise ConfigError(f"--data_path {value} has a share that is not above 0; {_FORM}.")
    if given and len(given) < len(weights):
        raise ConfigError(f"--data_path {value} gives a share to some of the sets only; {_FORM}.")
    return DataPaths(paths, tuple(given) if len(given) > 1 else None)


def _split(item: str) -> tuple[str, float | None]:
    """A path and its share."""
    path, colon, tail = item.rpartition(":")
    if not colon or os.path.exists(item):
        return item, None
    try:
        return path, float(tail)
    except ValueError:
        return item, None
