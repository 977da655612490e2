"""Train, validation and test without leaks: a source video falls in one split, with all its clips.

Flows in: the source of every document and the shares. Flows out: the split of every document.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cosmos_posttrain.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

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


def share_out(number: int, shares: Sequence[float]) -> list[int]:
    """Divides a number by largest remainder, at least one for each non-zero share.

    Args:
        number: at least as large as there are shares.
        shares: adding up to 1.
    """
    quotas = [number * share for share in shares]
    counts = [int(quota + 1e-9) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - quotas[i], i))
    for split in by_remainder[: number - sum(counts)]:
        counts[split] += 1
    for split, share in enumerate(shares):
        if share > 0 and counts[split] == 0:
            counts[counts.index(max(counts))] -= 1
            counts[split] = 1
    return counts


def split_digests(digests: NDArray[np.uint64], split_string: str = "98,1,1") -> NDArray[np.uint8]:
    """Deals distinct sources to the three splits.

    The order is that of a seeded hash of each name: the same seed gives the same split on every
    machine, whatever the order of the documents. With fewer than three sources everything is
    training data, with a warning.

    Args:
        digests: (num_runs, 2) uint64, ``SourceRuns.digests`` of one seed.
        split_string: the shares.

    Returns:
        (num_runs,) uint8: number in ``data.config.SPLITS`` of each run of documents.

    Raises:
        ConfigError: a malformed ``split_string``.
    """
    shares = parse_split_string(split_string)
    if not any(shares[1:]):
        return np.zeros(len(digests), np.uint8)
    order, ranks = _ranks(digests)
    num_sources = int(ranks[-1]) + 1 if len(ranks) else 0
    if num_sources < _MIN_SOURCES:
        logger.warning(
            "%d source video(s) are too few for split_string %s: all clips are used for training, "
            "validation and test are off (three sources or more would do).",
            num_sources,
            split_string,
        )
        return np.zeros(len(digests), np.uint8)
    num_train, num_validation, _ = share_out(num_sources, shares)
    splits = np.empty(len(digests), np.uint8)
    splits[order] = (ranks >= num_train).astype(np.uint8) + (ranks >= num_train + num_validation)
    return splits


def number_sources(digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """(num_runs,) a number for each distinct source, from (num_runs, 2) digests."""
    order, ranks = _ranks(digests)
    numbers = np.empty(len(digests), np.int64)
    numbers[order] = ranks
    return numbers


def _ranks(digests: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The order of runs by digest, and the place of each one's source in it; the same for equals.

    Args:
        digests: (num_runs, 2) uint64, the first half of each first.
    """
    order = np.argsort(digests[:, 0])
    high = digests[order, 0]
    if (high[1:] == high[:-1]).any():
        order = np.lexsort((digests[:, 1], digests[:, 0]))
        high = digests[order, 0]
    low = digests[order, 1]
    differs = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return order, np.concatenate([[0], np.cumsum(differs)])[: len(order)]
