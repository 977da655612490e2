"""Drafts from a model's Medusa heads, and how often each head was right.

Flows in: the heads' scores behind a token that is known to be right. Flows out: guesses of the
tokens behind the next one, each drawn with the random numbers of its place: what the heads would
say there, if they were the model. A guess changes how long decoding takes, never a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadRecord:
    """Of one clip, for each head: tokens that it foretold, and how many of them came."""

    foretold: tuple[int, ...]
    right: tuple[int, ...]

    def __add__(self, other: HeadRecord) -> HeadRecord:
        foretold, right = (
            tuple(a + b for a, b in zip(*pair, strict=True))
            for pair in ((self.foretold, other.foretold), (self.right, other.right))
        )
        return HeadRecord(foretold, right)

    def to_json(self) -> dict[str, list[int]]:
        """Plain values for a record."""
        return {"foretold": list(self.foretold), "right": list(self.right)}


class HeadCounts:
    """Of some clips that are decoded together, how many tokens each head foretold.

    Attributes:
        foretold: (B, N) int64 on the CPU; empty until it is known, and where no head was asked.
        right: likewise, how many of them came.
    """

    def __init__(self) -> None:
        self.foretold = self.right = torch.zeros(0, 0, dtype=torch.long)

    def of_clip(self, number: int) -> HeadRecord | None:
        """One clip's; None where no head was asked."""
        if not len(self.foretold):
            return None
        rows = self.foretold[number].tolist(), self.right[number].tolist()
        return HeadRecord(*map(tuple, rows))


class HeadDrafts:
    """The heads of a model that decodes some clips.

    Args:
        head_scores: see ``DecodeState.head_scores``.
        draw: of tokens, see ``decoding.Draw``.
        num_heads: N, that the model has.
        counts: filled by ``finish``.
    """

    def __init__(
        self,
        head_scores: Callable[[Tensor], Tensor],
        draw: Callable[[Tensor, Tensor], Tensor],
        num_heads: int,
        counts: HeadCounts | None = None,
    ) -> None:
        self._head_scores, self._draw, self.num_heads = head_scores, draw, num_heads
        self._counts = counts
        # What was foretold, (B, N) each, and the places of it.
        self._foretold: list[tuple[Tensor, Tensor]] = []

    def foretell(self, rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses of the tokens behind those that are known.

        Args:
            rows: (B,) int64, which of the places that were scored last the last right token that
                was fed stands at; what it scored is known.
            known: (B, 1) int64, tokens of each clip that are known.

        Returns:
            (B, N) int64 tokens, and their places.
        """
        places = known + torch.arange(self.num_heads, device=known.device)
        tokens = self._draw(self._head_scores(rows), places)
        if self._counts is not None:
            self._foretold.append((tokens, places))
        return tokens, places

    def finish(self, tokens: Tensor) -> None:
        """Holds all that was foretold against the clips (B, length); what lies behind is left."""
        if self._counts is None or not self._foretold:
            return
        length = tokens.shape[1]
        foretold = right = torch.zeros((), dtype=torch.long, device=tokens.device)
        for guesses, places in self._foretold:
            is_inside = places < length
            came = tokens.gather(1, places.clamp(max=length - 1)) == guesses
            foretold = foretold + is_inside
            right = right + (is_inside & came)
        self._counts.foretold, self._counts.right = foretold.cpu(), right.cpu()
