"""A copy of this rank's part of a checkpoint in host memory, to be written while training goes on.

Flows in: pieces, which are views of the model's and the optimizer's memory. Flows out: the same
pieces, bit for bit, in memory of their own. It is allocated once and used for every checkpoint, so
that copying costs no more than moving the bytes; on a GPU it is page-locked.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint.page_lock import PageLock
from cosmos_posttrain.checkpoint.pieces import Piece

_ALIGNMENT = 64  # bytes; of every dtype and of a cache line


class HostCopy:
    """Memory for the pieces of one rank.

    Args:
        pieces: what will be copied, in order; later copies are of pieces of the same sizes.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        sizes = [-(-piece.box[1].nbytes // _ALIGNMENT) * _ALIGNMENT for piece in pieces]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._memory = torch.empty(self._starts[-1], dtype=torch.uint8)
        self._memory.zero_()  # the system hands memory out when it is first written to
        # Not torch's pinned memory, which rounds up to powers of two.
        self._lock = (
            PageLock(self._memory, torch.cuda.cudart()) if torch.cuda.is_available() else None
        )

    def close(self) -> None:
        """Gives page-locked memory back; nothing may be copied any more."""
        if self._lock is not None:
            self._lock.release()

    def take(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Copies the pieces; the copies are valid until the next call."""
        copies = []
        for piece, start in zip(pieces, self._starts[:-1], strict=True):
            offsets, values = piece.box
            copy = self._at(start, values)
            copy.copy_(values, non_blocking=True)
            copies.append(dataclasses.replace(piece, box=(offsets, copy)))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copies

    def _at(self, start: int, like: Tensor) -> Tensor:
        numbers = self._memory[start : start + like.nbytes].view(like.dtype)
        return numbers.view(like.shape)
