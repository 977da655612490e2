"""How probable each generated token was.

Flows in: what a way of decoding makes known (``Decoded``). Flows out: log-probabilities in nats, at
temperature 1 among all tokens, guidance included: comparable over sampling settings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_posttrain.inference.decoding import Decoded


class LogProbs:
    """Collects what is decoded; stays on the model's device, nothing waits for it.

    Args:
        batch_size: clips.
        num_tokens: that are decoded of each.
        device: of the scores.
    """

    def __init__(self, batch_size: int, num_tokens: int, device: torch.device) -> None:
        self._values = torch.full((batch_size, num_tokens), float("nan"), device=device)

    def __call__(self, found: Decoded) -> None:
        """Takes in tokens and the scores that they were drawn from."""
        scores = found.scores.float()
        values = scores.gather(-1, found.tokens[..., None])[..., 0] - scores.logsumexp(-1)
        stop = found.first + values.shape[1]
        self._values[found.clips.start : found.clips.stop, found.first : stop] = values

    def of_clips(self, num_given: int) -> Tensor:
        """(B, num_given + num_tokens) float32 on the CPU; NaN for the given ones."""
        given = torch.full((len(self._values), num_given), float("nan"))
        return torch.cat([given, self._values.float().cpu()], dim=1)
