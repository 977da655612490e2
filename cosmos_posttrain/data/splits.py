"""Train, validation and test without leaks: a source video falls in one split, with all its clips.

Flows in: the source of every document and the shares. Flows out: document numbers of each split.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Sequence

from cosmos_posttrain.errors import ConfigError

SPLITS = ("train", "validation", "test")
_MIN_SOURCES = 3

logger = logging.getLogger(__name__)


def parse_split_string(value: str) -> tuple[float, float, float]:
    """Reads ``"98,1,1"``: the shares of train, validation and test, adding up to 1 afterwards.

    Raises:
        ConfigError: if it is not three numbers of which the first is above 0 and none below.
    """
    try:
        parts = tuple(float(part) for part in value.strip("[]() ").split(","))
    except ValueError:
        parts = ()
    if len(parts) != 3 or not all(0 <= part < float("inf") for part in parts) or parts[0] <= 0:
        raise ConfigError(
            f"split_string {value!r} is not three shares (train, validation, test), none below 0 "
            "and the first above 0; write it like 98,1,1."
        )
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total


def _counts(num_sources: int, shares: Sequence[float]) -> list[int]:
    """Sources of each split by largest remainder, at least one for each non-zero share."""
    quotas = [num_sources * share for share in shares]
    counts = [int(quota + 1e-9) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - quotas[i], i))
    for split in by_remainder[: num_sources - sum(counts)]:
        counts[split] += 1
    for split, share in enumerate(shares):
        if share > 0 and counts[split] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[split] = 1
    return counts


def split_sources(
    sources: Iterable[str], split_string: str = "98,1,1", seed: int = 1234
) -> dict[str, list[str]]:
    """Deals distinct sources to the three splits.

    The order is that of a seeded hash of each name: the same seed gives the same split on every
    machine, whatever the order of the documents. With fewer than three sources everything is
    training data, with a warning.

    Raises:
        ConfigError: a malformed ``split_string``.
    """
    shares = parse_split_string(split_string)

    def key(source: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}:{source}".encode()).digest(), source

    ordered = sorted(set(sources), key=key)
    if len(ordered) < _MIN_SOURCES and any(shares[1:]):
        logger.warning(
            "%d source video(s) are too few for split_string %s: all clips are used for training, "
            "validation and test are off (three sources or more would do).",
            len(ordered),
            split_string,
        )
        return {"train": ordered, "validation": [], "test": []}
    num_train, num_validation, _ = _counts(len(ordered), shares)
    return {
        "train": ordered[:num_train],
        "validation": ordered[num_train : num_train + num_validation],
        "test": ordered[num_train + num_validation :],
    }
