"""Rows of embeddings as they are stored, and as a model takes them.

Flows in: a prompt's rows, (length, width). Flows out: numbers for Megatron's indexed format, which
knows no bfloat16, and back; and contexts (B, context_len, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How rows are stored, and as which numbers.
STORED_DTYPES = {"bfloat16": "uint16", "float32": "float32"}


def pack_rows(rows: Tensor, dtype: str) -> NDArray[Any]:
    """Rows -> what is stored of them.

    Args:
        rows: (length, width) floats.
        dtype: ``bfloat16`` or ``float32``.

    Returns:
        (length * width,) uint16, which are the bits of bfloat16, or float32.
    """
    flat = rows.detach().to("cpu", getattr(torch, dtype)).flatten()
    if dtype == "bfloat16":
        return flat.view(torch.int16).numpy().view(np.uint16)
    assert dtype in STORED_DTYPES
    return flat.numpy()


def unpack_rows(stored: NDArray[Any], width: int, dtype: str) -> Tensor:
    """The opposite of ``pack_rows``; (length, width) in ``dtype``."""
    assert stored.dtype.name == STORED_DTYPES[dtype] and stored.size % width == 0
    if dtype == "bfloat16":
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).view(-1, width)
    return torch.from_numpy(stored).view(-1, width)


def pad_rows(rows: Sequence[Tensor], context_len: int) -> Tensor:
    """Puts zero rows behind each prompt's own, as the published models were trained.

    Args:
        rows: (length, width) each, with length at most ``context_len``; no rows at all are the
            null context, which no prompt has.
        context_len: rows of each result.

    Returns:
        (B, context_len, width) in the dtype and on the device of the first.
    """
    assert rows and all(len(row) <= context_len for row in rows)
    padded = rows[0].new_zeros(len(rows), context_len, rows[0].shape[-1])
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded
