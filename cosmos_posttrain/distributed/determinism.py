"""The same numbers in every run of the same command, on a GPU too.

Flows in: nothing. Flows out: torch, cuBLAS, NCCL and Transformer Engine, told to sum in the same
order each time. On a CPU they do so anyway.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

# Read when a library is first used on a GPU, so before anything is computed there.
_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Inside, a function without a deterministic form raises an error; some others are slower.

    What the environment says already stays as it is; it is not taken back at the end.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    were_used = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    was_filled = settings.fill_uninitialized_memory
    was_searched = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    # Nothing reads what it has not written: filling would only cost time.
    settings.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(were_used)
        settings.fill_uninitialized_memory = was_filled
        torch.backends.cudnn.benchmark = was_searched
