"""What is fed to the model next: tokens that are known, and guesses of those behind them.

Flows in: the given tokens of some clips, then what was drawn behind each fed one. Flows out:
windows of tokens to feed, and how many are known to be right. Nothing here waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Drafts:
    """Tokens of some clips, known ones and drafts of those behind them. All changes are in place.

    Args:
        prompt: (B, P) int64.
        num_tokens: to decode.
        window: tokens that are fed at once at most.
        tokens_per_frame: of a latent frame.
        room: places for drafts behind the clip, beside the window's.

    Attributes:
        tokens: (B, P + num_tokens + window + room) int64.
        known: of each clip, tokens that are right, (B, 1) int64.
        end: tokens of a complete clip.
        largest_window: tokens that are fed at once at most.
    """

    def __init__(
        self, prompt: Tensor, num_tokens: int, window: int, tokens_per_frame: int, room: int = 0
    ) -> None:
        self.end = prompt.shape[1] + num_tokens
        self.largest_window = window
        self._tokens_per_frame = tokens_per_frame
        self.tokens = torch.nn.functional.pad(prompt, (0, num_tokens + window + room))
        self._confirmed = torch.zeros_like(self.tokens, dtype=torch.bool)
        self.known = prompt.new_full((len(prompt), 1), prompt.shape[1])
        self._drafted = self.known.clone()  # those that are at least a draft
        self._steps = torch.arange(window, device=prompt.device)

    def begin(self, token: Tensor) -> None:
        """The first token (B, 1) behind the prompt."""
        self.tokens.scatter_(1, self.known, token)
        self.known += 1
        self._drafted += 1

    def append(self, token: Tensor, known: list[int]) -> list[int]:
        """A known token (B, 1) of each clip, where all stand at the same place."""
        self.tokens[:, known[0] : known[0] + 1] = token
        self.known += 1
        torch.maximum(self._drafted, self.known, out=self._drafted)
        return [number + 1 for number in known]

    def window(self, count: int) -> tuple[Tensor, Tensor]:
        """The last known token of each clip and drafts behind it, (B, count), and their places."""
        places = self.known - 1 + self._steps[:count]
        fed = self._at(places)
        torch.maximum(self._drafted, places[:, -1:] + 1, out=self._drafted)
        return fed, places

    def _at(self, places: Tensor) -> Tensor:
        """What is known or drafted at places (B, N); of new ones the token of the frame before."""
        older = self.tokens.gather(1, (places - self._tokens_per_frame).clamp_(min=0))
        return torch.where(places < self._drafted, self.tokens.gather(1, places), older)

    def take(self, fed: Tensor, drawn: Tensor, places: Tensor) -> Tensor:
        """Keeps what is right of a window, and makes better drafts of the rest.

        Args:
            fed: (B, N), see ``window``.
            drawn: (B, N) int64, what follows each of them if they are right.
            places: of what was fed.

        Returns:
            (B, 1) int64, drafts that were right.
        """
        is_same = drawn[:, :-1] == fed[:, 1:]
        num_right = is_same.long().cumprod(1).sum(1, keepdim=True)
        # The token behind the right drafts is right as well: all that it was drawn from is.
        num_new = (num_right + 1).minimum(self.end - self.known)
        inner = places[:, 1:]
        # A draft that was confirmed is left by the second pass that contradicts it.
        keeps = ~is_same & self._confirmed.gather(1, inner)
        keeps &= self._steps[: inner.shape[1]] >= num_new
        self._confirmed.scatter_(1, inner, is_same)
        self.tokens.scatter_(1, inner, torch.where(keeps, fed[:, 1:], drawn[:, :-1]))
        # Behind the window stands no draft yet, but what is known now.
        last = places[:, -1:] + 1
        self.tokens.scatter_(1, last, drawn[:, -1:])
        self.known += num_new
        torch.maximum(self._drafted, self.known, out=self._drafted)
        return num_right
