"""Drafts that a model's Medusa heads make beside the frame before; see ``drafts.py``.

Flows in and out: as there; after each pass the heads foretell what stands behind the known tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_posttrain.inference.drafts import Drafts
from cosmos_posttrain.inference.head_drafts import HeadDrafts


class ForetoldDrafts(Drafts):
    """As ``Drafts``; those of places that no pass has confirmed may come from the heads.

    Args:
        prompt: see ``Drafts``, as the next three.
        num_tokens: see there.
        window: see there.
        tokens_per_frame: see there.
        heads: that foretell tokens.
    """

    def __init__(
        self,
        prompt: Tensor,
        num_tokens: int,
        window: int,
        tokens_per_frame: int,
        heads: HeadDrafts,
    ) -> None:
        super().__init__(prompt, num_tokens, window, tokens_per_frame, heads.num_heads)
        self._heads = heads
        heads.begin(len(prompt), self.tokens.shape[1], window, prompt.device)

    def begin(self, token: Tensor) -> None:
        """The first token (B, 1) behind the prompt."""
        super().begin(token)
        self._foretell(torch.zeros_like(self.known))

    def take(self, fed: Tensor, drawn: Tensor, places: Tensor) -> Tensor:
        """See ``Drafts.take``; then the heads are held against what came, and asked again."""
        before = self.known.clone()
        num_right = super().take(fed, drawn, places)
        self._heads.learn(self.tokens, before, self.known)
        self._heads.follow(bool(self._heads.any_followed()))
        self._foretell(num_right)
        return num_right

    def _foretell(self, rows: Tensor) -> None:
        """Drafts from the heads, of places that no pass has confirmed a draft of.

        Args:
            rows: (B, 1), see ``HeadDrafts.foretell``.
        """
        if not self._heads.is_asked():
            return
        places = self._heads.places(self.known)
        standing = self._at(places)
        guesses, is_followed = self._heads.foretell(rows[:, 0], self.known, standing)
        is_followed &= ~self._confirmed.gather(1, places)
        self.tokens.scatter_(1, places, torch.where(is_followed, guesses, standing))
        torch.maximum(self._drafted, places[:, -1:] + 1, out=self._drafted)
