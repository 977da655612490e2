"""Tensors as bytes: how many, and which. What the writers of files share.

Flows in: a tensor, or its shape and dtype. Flows out: its bytes without a copy, or their number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Shape and dtype of tensors by name, in the order in which they come.
Tensors = dict[str, tuple[tuple[int, ...], torch.dtype]]


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    array: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
