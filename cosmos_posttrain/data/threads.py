"""The same for many files, in several threads: network file systems take their time for each.

Flows in: a function and a sequence. Flows out: its results in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

_NUM_THREADS = 8
_CHUNKS_AHEAD = 40


def mapped(
    function: Callable[[S], T],
    items: Sequence[S],
    num_threads: int = _NUM_THREADS,
    chunk_size: int = 25,
) -> Iterator[T]:
    """``map`` in several threads, a bounded number of results ahead.

    Args:
        function: called for every item.
        items: what for.
        num_threads: at the same time.
        chunk_size: items that one thread takes at once; more of them for quicker functions.
    """

    def run(first: int) -> list[T]:
        return [function(item) for item in items[first : first + chunk_size]]

    step = chunk_size * _CHUNKS_AHEAD
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, len(items), step):
            end = min(start + step, len(items))
            for results in pool.map(run, range(start, end, chunk_size)):
                yield from results
