"""Ways to decode: what is fed to the model next, and which tokens are kept.

Flows in: scores of what comes next (a ``NextScores``), the given tokens (B, P), and how a token is
drawn. Flows out: the next N tokens (B, N).

A token is drawn from the scores at its place by random numbers of that place alone (``noise.py``).
So a guess can be checked: if the tokens before it are right, it is right where it is what is drawn
there. ``decode_in_windows`` feeds guesses, many at once, and keeps the longest right beginning;
what comes out is token by token what ``decode_one_by_one`` gives (speculative Jacobi decoding,
arXiv:2410.01699; with random numbers that stay, arXiv:2510.24211).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.inference.head_drafts import HeadDrafts
from cosmos_posttrain.inference.windows import LARGEST_WINDOW, WindowChoice

Progress = Callable[[int], None]
# Tokens (B, N) from scores (B, N, vocab_size) and their positions, (N,) or (B, N).
Draw = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Decoded:
    """Tokens that have become known.

    Attributes:
        clips: of the batch that they belong to, B of them.
        first: number of the first of them among those decoded.
        tokens: (B, N) int64.
        scores: (B, N, vocab_size) that they were drawn from; valid until the next pass.
    """

    clips: range
    first: int
    tokens: Tensor
    scores: Tensor


Observe = Callable[[Decoded], None]


class NextScores(Protocol):
    """A model with a cache of the tokens that it was fed.

    Attributes:
        length: tokens in the cache; set back, it forgets those behind.
    """

    length: int

    def feed(self, tokens: Tensor, num_scores: int = 1, starts: list[int] | None = None) -> Tensor:
        """Feeds (B, N) tokens.

        Args:
            tokens: int64.
            num_scores: of so many of the last of them scores are wanted.
            starts: of each clip where its first token stands; None is behind those in the cache,
                which are then more.

        Returns:
            (B, num_scores, vocab_size): scores of what follows each of the last of them.
        """


def check_finite(scores: Tensor) -> None:
    """Refuses scores that no token can be drawn from.

    Raises:
        CosmosPosttrainError: they are not finite.
    """
    if not bool(torch.isfinite(scores).all()):
        raise CosmosPosttrainError(
            "the model's logits are not finite: the weights are damaged or their training diverged."
        )


def decode_one_by_one(
    scores: NextScores,
    prompt: Tensor,
    num_tokens: int,
    draw: Draw,
    progress: Progress | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Feeds the prompt, then each drawn token.

    Args:
        scores: with an empty cache.
        prompt: (B, P) int64.
        num_tokens: to decode.
        draw: of a token.
        progress: called with the number of tokens so far, after each.
        observe: called with each token.

    Returns:
        (B, num_tokens) int64.

    Raises:
        CosmosPosttrainError: scores that are not finite.
    """
    batch_size, length = prompt.shape
    decoded = prompt.new_empty(batch_size, num_tokens)
    places = torch.arange(length, length + num_tokens, device=prompt.device)
    found = scores.feed(prompt)
    check_finite(found)
    for number in range(num_tokens):
        token = draw(found, places[number : number + 1])
        decoded[:, number : number + 1] = token
        if observe is not None:
            observe(Decoded(range(batch_size), number, token, found))
        if progress is not None:
            progress(number + 1)
        if number + 1 < num_tokens:
            found = scores.feed(token)
    # What is not finite stays so through the cache: the last scores speak for all.
    check_finite(found)
    return decoded


def decode_in_windows(
    scores: NextScores,
    prompt: Tensor,
    num_tokens: int,
    draw: Draw,
    window: int | None,
    tokens_per_frame: int,
    progress: Progress | None = None,
    observe: Observe | None = None,
    heads: HeadDrafts | None = None,
) -> Tensor:
    """Feeds the last known token and drafts of those behind it, and keeps those that are right.

    A draft starts as the token at the same place of the latent frame before. After a forward pass
    it becomes what was drawn at its place, but not at once where the same had been drawn before:
    a draft that was confirmed is left when two passes in a row contradict it. Each clip goes on
    from its own last known token.

    Args:
        scores: with an empty cache that has room for a window of tokens more than the clip.
        prompt: (B, P) int64.
        num_tokens: to decode.
        draw: of tokens.
        window: tokens that are fed at once, at least 2; no more than a latent frame and one. None
            chooses from pass to pass.
        tokens_per_frame: of a latent frame.
        progress: called with the number of tokens so far, the clips' mean, after each pass.
        observe: called with the tokens that each pass makes known, clip by clip.
        heads: the model's Medusa heads, where it has some.

    Returns:
        (B, num_tokens) int64.

    Raises:
        CosmosPosttrainError: scores that are not finite.
    """
    batch_size, first = prompt.shape
    end = first + num_tokens
    # What a new draft is copied from is known then.
    largest = min(window or LARGEST_WINDOW, tokens_per_frame + 1)
    choice = WindowChoice(batch_size, prompt.device, largest, window)
    found = scores.feed(prompt)
    check_finite(found)
    drafts = _Drafts(prompt, num_tokens, largest, tokens_per_frame, heads)
    places = torch.arange(end, device=prompt.device)
    token = draw(found, places[first : first + 1])
    drafts.begin(token)
    if observe is not None:
        observe(Decoded(range(batch_size), 0, token, found))
    known = [first + 1] * batch_size
    while min(known) < end:
        count = min(choice.next(), end - min(known))
        starts, before = [number - 1 for number in known], known
        is_common = min(starts) == max(starts)
        if is_common:
            scores.length = starts[0]
        if is_common and count == 1:
            found = scores.feed(drafts.tokens[:, starts[0] : known[0]])
            drawn = draw(found, places[known[0] : known[0] + 1])
            known = drafts.append(drawn, known)
        else:
            fed, fed_places = drafts.window(count)
            found = scores.feed(fed, count, None if is_common else starts)
            drawn = draw(found, fed_places + 1)
            known = drafts.take(fed, drawn, fed_places)
        pairs = zip(before, known, strict=True)
        choice.learn([new - old for old, new in pairs if old < end])
        if observe is not None:
            for clip, (old, new) in enumerate(zip(before, known, strict=True)):
                if new > old:
                    new_tokens, scored = (x[clip : clip + 1, : new - old] for x in (drawn, found))
                    clips = range(clip, clip + 1)
                    observe(Decoded(clips, old - first, new_tokens, scored))
        if progress is not None:
            progress(sum(known) // batch_size - first)
    check_finite(found)
    if heads is not None:
        heads.finish()
    return drafts.tokens[:, first:end]


class _Drafts:
    """Tokens of some clips, known ones and drafts of those behind them.

    Args:
        prompt: (B, P) int64.
        num_tokens: to decode.
        window: tokens that are fed at once at most.
        tokens_per_frame: of a latent frame.
        heads: that foretell tokens; None leaves all new drafts to the frame before.

    Attributes:
        tokens: (B, P + num_tokens, and room for drafts behind them) int64.
    """

    def __init__(
        self,
        prompt: Tensor,
        num_tokens: int,
        window: int,
        tokens_per_frame: int,
        heads: HeadDrafts | None = None,
    ) -> None:
        self._end = prompt.shape[1] + num_tokens
        self._tokens_per_frame, self._heads = tokens_per_frame, heads
        room = window + (0 if heads is None else heads.num_heads)
        self.tokens = torch.nn.functional.pad(prompt, (0, num_tokens + room))
        self._confirmed = torch.zeros_like(self.tokens, dtype=torch.bool)
        # Of each clip, (B, 1): tokens that are right, and those that are at least a draft.
        self._known = self._drafted = prompt.new_full((len(prompt), 1), prompt.shape[1])
        self._steps = torch.arange(window, device=prompt.device)
        if heads is not None:
            heads.begin(len(prompt), self.tokens.shape[1], window, prompt.device)

    def begin(self, token: Tensor) -> None:
        """The first token (B, 1) behind the prompt."""
        self.tokens.scatter_(1, self._known, token)
        self._known = self._drafted = self._known + 1
        self._foretell(torch.zeros_like(self._known))

    def _foretell(self, rows: Tensor) -> None:
        """Drafts from the heads, of places that no pass has confirmed a draft of.

        Args:
            rows: (B, 1), see ``HeadDrafts.foretell``.
        """
        if self._heads is None or not self._heads.is_asked():
            return
        places = self._heads.places(self._known)
        standing = self._at(places)
        guesses, is_followed = self._heads.foretell(rows[:, 0], self._known, standing)
        is_followed &= ~self._confirmed.gather(1, places)
        self.tokens.scatter_(1, places, torch.where(is_followed, guesses, standing))
        self._drafted = self._drafted.maximum(places[:, -1:] + 1)

    def _at(self, places: Tensor) -> Tensor:
        """What is known or drafted at places (B, N); of new ones the token of the frame before."""
        older = self.tokens.gather(1, (places - self._tokens_per_frame).clamp_(min=0))
        return torch.where(places < self._drafted, self.tokens.gather(1, places), older)

    def append(self, token: Tensor, known: list[int]) -> list[int]:
        """A known token (B, 1) of each clip, where all stand at the same place."""
        self.tokens[:, known[0] : known[0] + 1] = token
        self._known = self._known + 1
        self._drafted = self._drafted.maximum(self._known)
        return [number + 1 for number in known]

    def window(self, count: int) -> tuple[Tensor, Tensor]:
        """The last known token of each clip and drafts behind it, (B, count), and their places."""
        places = self._known - 1 + self._steps[:count]
        fed = self._at(places)
        self._drafted = self._drafted.maximum(places[:, -1:] + 1)
        return fed, places

    def take(self, fed: Tensor, drawn: Tensor, places: Tensor) -> list[int]:
        """Keeps what is right of a window, and makes better drafts of the rest.

        Args:
            fed: (B, N), see ``window``.
            drawn: (B, N) int64, what follows each of them if they are right.
            places: of what was fed.

        Returns:
            Tokens of each clip that are known now.
        """
        is_same = drawn[:, :-1] == fed[:, 1:]
        num_right = is_same.long().cumprod(1).sum(1, keepdim=True)
        # The token behind the right drafts is right as well: all that it was drawn from is.
        num_new = (num_right + 1).minimum(self._end - self._known)
        inner = places[:, 1:]
        # A draft that was confirmed is left by the second pass that contradicts it.
        keeps = ~is_same & self._confirmed.gather(1, inner)
        keeps &= self._steps[: inner.shape[1]] >= num_new
        self._confirmed.scatter_(1, inner, is_same)
        self.tokens.scatter_(1, inner, torch.where(keeps, fed[:, 1:], drawn[:, :-1]))
        # Behind the window stands no draft yet, but what is known now.
        last = places[:, -1:] + 1
        self.tokens.scatter_(1, last, drawn[:, -1:])
        before, self._known = self._known, self._known + num_new
        self._drafted = self._drafted.maximum(self._known)
        if self._heads is None:
            return self._known.flatten().tolist()
        self._heads.learn(self.tokens, before, self._known)
        *known, is_followed = torch.cat([self._known[:, 0], self._heads.any_followed()]).tolist()
        self._heads.follow(bool(is_followed))
        self._foretell(num_right)
        return known
