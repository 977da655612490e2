"""Tokens as they become known, clip by clip, for those who show a clip before it is complete.

Flows in: what is decoded, from ``generate``. Flows out: all tokens of a clip so far, on the CPU,
once a latent frame: the device is never waited for in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cosmos_posttrain.inference.decoding import Decoded, Observe

# Number of the clip in its batch, and its tokens so far, given ones included: (n,) int64.
OnTokens = Callable[[int, Tensor], None]


class Watch:
    """Tells of the clips of a batch; see ``Observe``.

    Args:
        given: (B, P) int64 on the model's device, tokens of the clips' own.
        num_tokens: that are decoded behind them.
        tokens_per_frame: of a latent frame.
        on_tokens: called when a latent frame of a clip is complete, and at the clip's end.
    """

    def __init__(
        self, given: Tensor, num_tokens: int, tokens_per_frame: int, on_tokens: OnTokens
    ) -> None:
        self._tokens = torch.nn.functional.pad(given, (0, num_tokens))
        self._num_given = given.shape[1]
        self._tokens_per_frame, self._on_tokens = tokens_per_frame, on_tokens
        self._num_told = [self._num_given // tokens_per_frame] * len(given)

    def __call__(self, found: Decoded) -> None:
        """Takes what has become known."""
        start = self._num_given + found.first
        end = start + found.tokens.shape[1]
        self._tokens[found.clips.start : found.clips.stop, start:end] = found.tokens
        for clip in found.clips:
            frames = end // self._tokens_per_frame
            if frames > self._num_told[clip]:
                self._num_told[clip] = frames
                self._on_tokens(clip, self._tokens[clip, :end].cpu())


def all_of(*observers: Observe | None) -> Observe | None:
    """One observer that tells all of them; None where there is none."""
    wanted = [observe for observe in observers if observe is not None]
    if not wanted:
        return None

    def tell(found: Decoded) -> None:
        for observe in wanted:
            observe(found)

    return tell
