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
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.inference.drafts import Drafts
from cosmos_posttrain.inference.foretold_drafts import ForetoldDrafts
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


class Passes(Protocol):
    """Passes over a window of some clips, one after another."""

    def __call__(self, count: int, known: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """Feeds the last known token of each clip and drafts, and keeps what is right.

        Args:
            count: tokens of each clip to feed, at least 1.
            known: tokens of each clip that are known.

        Returns:
            (B, count) int64 drawn behind each of them, the scores that they were drawn from, valid
            until the next pass, and tokens of each clip that are known now.
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
    open_passes: Callable[[Drafts], Passes] | None = None,
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
        window: tokens that are fed at once, 1 without drafts; no more than a latent frame and one.
            None chooses from pass to pass.
        tokens_per_frame: of a latent frame.
        progress: called with the number of tokens so far, the clips' mean, after each pass.
        observe: called with the tokens that each pass makes known, clip by clip where their numbers
            differ.
        open_passes: how windows are fed, called when the prompt was and before anything is told;
            by default to ``scores``.
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
    if heads is None:
        drafts = Drafts(prompt, num_tokens, largest, tokens_per_frame)
    else:
        drafts = ForetoldDrafts(prompt, num_tokens, largest, tokens_per_frame, heads)
    token = draw(found, torch.tensor([first], device=prompt.device))
    drafts.begin(token)
    known = [first + 1] * batch_size
    passes = (open_passes or partial(PlainPasses, scores, draw))(drafts)
    if observe is not None:
        observe(Decoded(range(batch_size), 0, token, found))
    while min(known) < end:
        count = min(choice.next(), end - min(known))
        before = known
        drawn, found, known = passes(count, before)
        pairs = list(zip(before, known, strict=True))
        choice.learn([new - old for old, new in pairs if old < end])
        if observe is not None:
            step = batch_size if len(set(pairs)) == 1 else 1
            for clip in range(0, batch_size, step):
                (old, new), clips = pairs[clip], range(clip, clip + step)
                rows = slice(clip, clip + step)
                if new > old:
                    new_tokens, scored = (x[rows, : new - old] for x in (drawn, found))
                    observe(Decoded(clips, old - first, new_tokens, scored))
        if progress is not None:
            progress(sum(known) // batch_size - first)
    check_finite(found)
    if heads is not None:
        heads.finish()
    return drafts.tokens[:, first:end]


class PlainPasses:
    """Passes through a ``NextScores``; see ``Passes``.

    Args:
        scores: fed with the prompt.
        draw: of tokens.
        drafts: what is fed.
    """

    def __init__(self, scores: NextScores, draw: Draw, drafts: Drafts) -> None:
        self._scores, self._draw, self._drafts = scores, draw, drafts
        self._places = torch.arange(drafts.tokens.shape[1], device=drafts.tokens.device)

    def __call__(self, count: int, known: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """See ``Passes``."""
        scores, drafts = self._scores, self._drafts
        starts = [number - 1 for number in known]
        is_common = min(starts) == max(starts)
        if is_common:
            scores.length = starts[0]
        if is_common and count == 1:
            found = scores.feed(drafts.tokens[:, starts[0] : known[0]])
            drawn = self._draw(found, self._places[known[0] : known[0] + 1])
            return drawn, found, drafts.append(drawn, known)
        fed, places = drafts.window(count)
        found = scores.feed(fed, count, None if is_common else starts)
        drawn = self._draw(found, places + 1)
        drafts.take(fed, drawn, places)
        return drawn, found, drafts.known.flatten().tolist()
