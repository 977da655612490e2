"""Clips longer than the model's: each chunk continues the tokens of the one before.

Flows in: requests for several chunks, and what generates one chunk. Flows out: clips whose tokens
are those of one long causal clip; nothing is decoded and encoded again in between.

    chunk 1    given  G          | generated T - G
    chunk 2    given  1 and  O   | generated T - 1 - O     the first latent frame, and the last O
    ...        given  1 and  O   | generated T - 1 - O

At the start of a clip a model expects a latent frame that stands for one frame; the last ones of a
chunk stand for several. So the clip's own first one is kept in front, as an anchor. What that is
worth, and what plain shifting costs, was measured: docs/inference.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.inference.request import GeneratedClip, Request
from cosmos_posttrain.inference.watching import OnTokens

Progress = Callable[[int], None]
Generate = Callable[[Sequence[Request], Progress | None, OnTokens | None], Sequence[GeneratedClip]]


def seed_of_chunk(seed: int, chunk: int) -> int:
    """The seed of a chunk's random numbers; the first chunk has the request's own."""
    if chunk == 0:
        return seed
    return int(np.random.SeedSequence([seed, chunk]).generate_state(1, np.uint64)[0] >> 1)


def roll_out(
    generate: Generate,
    requests: Sequence[Request],
    geometry: ClipGeometry,
    progress: Progress | None = None,
    on_tokens: OnTokens | None = None,
) -> list[GeneratedClip]:
    """Generates clips of several chunks.

    Args:
        generate: makes one chunk of each.
        requests: with equal numbers of chunks and overlaps.
        geometry: of a chunk.
        progress: called with the number of tokens of each clip that are generated so far.
        on_tokens: called with the number of a request and its tokens so far, given ones included.

    Returns:
        One for each request, with the settings of its first chunk.
    """
    first = [dataclasses.replace(r, num_rollout_chunks=1, rollout_overlap=None) for r in requests]
    overlap, anchor = requests[0].num_overlapping(geometry), requests[0].rollout_anchor
    num_given = overlap + anchor
    clips = list(generate(first, progress, on_tokens))
    for chunk in range(1, requests[0].num_rollout_chunks):
        done = clips[0].num_generated_tokens
        going_on = [
            _next_request(request, _carried(clip.tokens, overlap, anchor), chunk)
            for request, clip in zip(first, clips, strict=True)
        ]
        show = None if progress is None else partial(_shifted, progress, done)
        count = num_given * geometry.latent_shape.tokens_per_frame
        tell = None if on_tokens is None else partial(_joined, on_tokens, clips, count)
        found = generate(going_on, show, tell)
        clips = [_append(clip, new, num_given) for clip, new in zip(clips, found, strict=True)]
    return clips


def _carried(tokens: Tensor, overlap: int, anchor: bool) -> Tensor:
    """What the next chunk is given of the tokens so far."""
    return torch.cat([tokens[:1], tokens[-overlap:]]) if anchor else tokens[-overlap:]


def _next_request(request: Request, given: Tensor, chunk: int) -> Request:
    source: dict[str, Any] = {"path": None, "frames": None, "num_input_frames": None}
    seed = seed_of_chunk(request.seed, chunk)
    return dataclasses.replace(request, **source, tokens=given, seed=seed)


def _shifted(progress: Progress, done: int, count: int) -> None:
    progress(done + count)


def _joined(
    on_tokens: OnTokens,
    clips: Sequence[GeneratedClip],
    num_given: int,
    number: int,
    tokens: Tensor,
) -> None:
    """A chunk's tokens so far, behind those of the chunks before it."""
    on_tokens(number, torch.cat([clips[number].tokens.flatten(), tokens[num_given:]]))


def _append(clip: GeneratedClip, new: GeneratedClip, num_given: int) -> GeneratedClip:
    """The clip with what is new of its next chunk."""
    log_probs = None
    if clip.log_probs is not None and new.log_probs is not None:
        log_probs = torch.cat([clip.log_probs, new.log_probs[num_given:]])
    seconds = {
        name: clip.seconds.get(name, 0.0) + new.seconds.get(name, 0.0)
        for name in clip.seconds | new.seconds
    }
    heads = clip.draft_heads
    if heads is not None and new.draft_heads is not None:
        heads = heads + new.draft_heads
    return dataclasses.replace(
        clip,
        draft_heads=heads,
        tokens=torch.cat([clip.tokens, new.tokens[num_given:]]),
        log_probs=log_probs,
        seconds=seconds,
    )
