"""A stand-in for a model's decoding steps, whose scores are a function of all tokens before."""

from __future__ import annotations

import torch


class FedTokens:
    """Flows in: tokens behind others; out: what ``scores_at`` says of their places.

    Attributes:
        places: (B, scores) of the last pass.
    """

    def __init__(self, batch_size: int) -> None:
        self._tokens = torch.zeros(batch_size, 1000, dtype=torch.long)
        self.length, self.num_passes = 0, 0
        self.places = torch.zeros(batch_size, 1, dtype=torch.long)

    def feed(
        self, tokens: torch.Tensor, num_scores: int = 1, starts: list[int] | None = None
    ) -> torch.Tensor:
        batch, count = tokens.shape
        if starts is None:
            starts = [self.length] * batch
            self.length += count
        self.num_passes += 1
        self.places = torch.tensor(starts)[:, None] + torch.arange(count - num_scores, count)
        rows = []
        for clip, start in enumerate(starts):
            self._tokens[clip, start : start + count] = tokens[clip]
            for place in self.places[clip].tolist():
                seen = self._tokens[clip, : place + 1]
                total = int((seen * torch.arange(1, place + 2)).sum())
                rows.append(self.scores_at(seen, total))
        return torch.stack(rows).view(batch, num_scores, -1)

    def scores_at(self, seen: torch.Tensor, total: int) -> torch.Tensor:
        """(V,) scores behind the tokens ``seen``, whose sum, weighted by place, is ``total``."""
        raise NotImplementedError
