"""The next batch, made while the present one is trained on.

Flows in: an iterator of batches. Flows out: the same batches in the same order, one of them always
made ahead by a thread, in memory that a GPU copies from without waiting.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from cosmos_posttrain.data.batch import Batch


def prefetched(batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """The same global batches, one ahead; an error comes where its batch would have come.

    Args:
        batches: read by one other thread from here on, and by nobody else.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        ahead = thread.submit(_next, batches)
        while (batch := ahead.result()) is not None:
            ahead = thread.submit(_next, batches)
            yield batch


def _next(batches: Iterator[list[Batch]]) -> list[Batch] | None:
    found = next(batches, None)
    if found is None or not torch.cuda.is_available():
        return found
    return [batch.pinned() for batch in found]
