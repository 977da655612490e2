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

# Heads that no clip follows are asked after one of so many passes.
_PAUSE = 8


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

    Another draft stands at every place. So a head is followed only while it was right more
    often than those, in the same clip; where no head is, they are asked now and then.

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
        self._num_passes = 0
        self._is_followed = True

    def begin(self, batch_size: int, length: int, largest: int, device: torch.device) -> None:
        """Takes on clips.

        Args:
            batch_size: B.
            length: places of a clip, drafts behind its end included.
            largest: number of tokens that one pass can make known.
            device: of the model.
        """
        shape = (batch_size, self.num_heads)
        # Of each head, and what stood there without it; -1 where it was not asked.
        self._guesses = torch.full((*shape, length), -1, device=device)
        self._standing = self._guesses.clone()
        # Of each clip and head how many tokens it foretold, how many of them came, and how many
        # would have come without it.
        self._asked = torch.zeros(shape, dtype=torch.long, device=device)
        self._right, self._right_without = self._asked.clone(), self._asked.clone()
        self._steps = torch.arange(max(largest, self.num_heads), device=device)
        self._largest = largest

    def is_asked(self) -> bool:
        """Whether the heads are to foretell after this pass."""
        self._num_passes += 1
        return self._is_followed or self._num_passes % _PAUSE == 0

    def places(self, known: Tensor) -> Tensor:
        """(B, N) int64, what the heads foretell where (B, 1) tokens are known."""
        return known + self._steps[: self.num_heads]

    def foretell(self, rows: Tensor, known: Tensor, standing: Tensor) -> tuple[Tensor, Tensor]:
        """Guesses of the tokens behind those that are known.

        Args:
            rows: (B,) int64, which of the places that were scored last the last right token that
                was fed stands at; what it scored is known.
            known: (B, 1) int64, tokens of each clip that are known.
            standing: (B, N) int64, drafts that stand at their places.

        Returns:
            (B, N) int64 tokens, and whether they are to be followed.
        """
        places = self.places(known)
        tokens = self._draw(self._head_scores(rows), places)
        self._guesses.scatter_(2, places[..., None], tokens[..., None])
        self._standing.scatter_(2, places[..., None], standing[..., None])
        return tokens, self._right > self._right_without

    def learn(self, tokens: Tensor, before: Tensor, known: Tensor) -> None:
        """Holds guesses against tokens that became known.

        Args:
            tokens: (B, length).
            before: (B, 1) int64, tokens that were known before.
            known: (B, 1) int64, those that are known now.
        """
        places = before + self._steps[: self._largest]
        of_heads = places[:, None].expand(-1, self.num_heads, -1)
        guesses, standing = self._guesses.gather(2, of_heads), self._standing.gather(2, of_heads)
        is_asked = (places < known)[:, None] & (guesses >= 0)
        came = tokens.gather(1, places)[:, None]
        self._asked += is_asked.sum(2)
        self._right += (is_asked & (guesses == came)).sum(2)
        self._right_without += (is_asked & (standing == came)).sum(2)

    def any_followed(self) -> Tensor:
        """(1,) int64: whether some head is right more often than what is there without it."""
        return (self._right > self._right_without).any().long()[None]

    def follow(self, is_followed: bool) -> None:
        """Takes in what ``any_followed`` said, on the host."""
        self._is_followed = is_followed

    def finish(self) -> None:
        """Gives the counts."""
        if self._counts is not None:
            self._counts.foretold, self._counts.right = self._asked.cpu(), self._right.cpu()
