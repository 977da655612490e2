"""Ways to decode: what is fed to the model next, and which tokens are kept.

Flows in: scores of what comes next (a ``Scores``), the given tokens (B, P), and how a token is
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
from cosmos_posttrain.inference.sampling import Draw

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Decoded:
    """Tokens that have become known.

    Attributes:
        clips: of the batch that they belong to, B of them.
        first: number of the first of them among those decoded.
        tokens: (B, N) int64.
        scores: (B, N, vocab_size) float32 that they were drawn from; valid until the next pass.
    """

    clips: range
    first: int
    tokens: Tensor
    scores: Tensor


Observe = Callable[[Decoded], None]


class Scores(Protocol):
    """A model with a cache of the tokens that it was fed.

    Attributes:
        length: tokens in the cache; set back, it forgets those behind.
    """

    length: int

    def feed(self, tokens: Tensor, num_scores: int = 1) -> Tensor:
        """Feeds (B, N) tokens behind those in the cache.

        Returns:
            (B, num_scores, vocab_size) float32: scores of what follows each of the last of them.
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
    scores: Scores,
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
    found = scores.feed(prompt)
    check_finite(found)
    for number in range(num_tokens):
        token = draw(found, length + number)
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
    scores: Scores,
    prompt: Tensor,
    num_tokens: int,
    draw: Draw,
    window: int,
    tokens_per_frame: int,
    progress: Progress | None = None,
    observe: Observe | None = None,
) -> Tensor:
    """Feeds the last known token and drafts of those behind it, and keeps those that are right.

    A draft starts as the token at the same place of the latent frame before. After a forward pass
    it becomes what was drawn at its place, but not at once where the same had been drawn before:
    a draft that was confirmed is left when two passes in a row contradict it.

    Args:
        scores: with an empty cache that has room for ``window`` tokens more than the clip.
        prompt: (1, P) int64.
        num_tokens: to decode.
        draw: of a token.
        window: tokens that are fed at once, at least 2.
        tokens_per_frame: of a latent frame.
        progress: called with the number of tokens so far, after each pass.
        observe: called with the tokens that each pass makes known.

    Returns:
        (1, num_tokens) int64.

    Raises:
        CosmosPosttrainError: scores that are not finite.
    """
    first = prompt.shape[1]
    end = first + num_tokens
    tokens = torch.cat([prompt, prompt.new_zeros(1, num_tokens)], 1)
    confirmed = torch.zeros(end, dtype=torch.bool, device=prompt.device)
    found = scores.feed(prompt)
    check_finite(found)
    tokens[:, first : first + 1] = draw(found, first)
    if observe is not None:
        observe(Decoded(range(1), 0, tokens[:, first : first + 1], found))
    known = drafted = first + 1  # tokens that are right, and tokens that are at least a draft
    while known < end:
        stop = min(known - 1 + window, end)
        for place in range(drafted, stop):
            tokens[:, place] = tokens[:, max(place - tokens_per_frame, 0)]
        drafted = max(drafted, stop)
        scores.length = known - 1
        fed = tokens[:, known - 1 : stop]
        found = scores.feed(fed, fed.shape[1])
        drawn = draw(found, known)[0]
        drafts = tokens[0, known:stop]
        is_same = drawn[: len(drafts)] == drafts
        num_right = int(is_same.long().cumprod(0).sum())
        # The token behind the right drafts is right as well: all that it was drawn from is.
        num_new = min(num_right + 1, end - known)
        keeps = ~is_same & confirmed[known:stop]
        confirmed[known:stop] = is_same
        drafts[:] = torch.where(keeps, drafts, drawn[: len(drafts)])
        tokens[0, known : known + num_new] = drawn[:num_new]
        if observe is not None:
            new = tokens[:, known : known + num_new]
            observe(Decoded(range(1), known - first, new, found[:, :num_new]))
        known += num_new
        drafted = max(drafted, known)
        if progress is not None:
            progress(known - first)
    check_finite(found)
    return tokens[:, first:]
