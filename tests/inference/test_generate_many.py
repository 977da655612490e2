"""Clips of one batch: each is what it is alone; what does not go together; tokens as they come."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import infer_case
from helpers.infer_case import LATENT_SHAPE

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session

FRAME = LATENT_SHAPE.tokens_per_frame


@cache
def session(**changes: str) -> Session:
    return Session(infer_case.random_config(Path("unused"), Path("unused"), **changes))


def with_text() -> Session:
    return session(ar_model_dir="random:tiny-video2world", text_encoder_path="tiny")


def given(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 1000, (1, *LATENT_SHAPE[1:]), generator=generator)


def requests(**settings: float) -> list[Request]:
    return [
        Request(tokens=given(n), item=n, sample=n % 2, seed=3 - n, **settings) for n in range(3)
    ]


@pytest.mark.parametrize("decoding", ["sequential", "jacobi"])
def test_a_clip_of_a_batch_is_what_it_is_alone(decoding: str) -> None:
    together = session(decoding=decoding).generate_many(requests(top_p=0.9))
    alone = [session().generate(request) for request in requests(top_p=0.9)]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert one.settings == other.settings
    assert together[0].record["decoding"] == decoding
    assert len({tuple(clip.tokens.flatten().tolist()) for clip in together}) == 3


def test_item_and_sample_are_settings_that_decide() -> None:
    base = Request(tokens=given(0), top_p=0.9)
    clips = [
        session().generate(dataclasses.replace(base, **change))
        for change in ({}, {"item": 1}, {"sample": 1}, {"seed": 1})
    ]
    assert len({tuple(clip.tokens.flatten().tolist()) for clip in clips}) == 4
    assert len({str(clip.settings) for clip in clips}) == 4
    assert torch.equal(session().generate(base).tokens, clips[0].tokens)


def test_texts_of_a_batch() -> None:
    texts = [("a ball", "a box"), ("two boxes", None), ("a wall", "a ball")]
    batch = [
        Request(tokens=given(0), prompt=text, negative_prompt=other, guidance_scale=2.0)
        for text, other in texts
    ]
    together = with_text().generate_many(batch)
    for request, clip in zip(batch, together, strict=True):
        assert torch.equal(with_text().generate(request).tokens, clip.tokens)


def test_requests_that_do_not_go_together_are_refused() -> None:
    one = Request(tokens=given(0), top_p=0.9)
    for change, message in (
        ({"top_p": 0.8}, "one top_p, not"),
        ({"temperature": 0.0}, "one temperature"),
        ({"tokens": torch.cat([given(0), given(1)])}, "one number of given frames, not"),
    ):
        with pytest.raises(ConfigError, match=message):
            session().generate_many([one, dataclasses.replace(one, **change)])
    with pytest.raises(ConfigError, match="there is no request"):
        session().generate_many([])
    with pytest.raises(ConfigError, match="item -1 must lie in"):
        Request(tokens=given(0), item=-1)


@pytest.mark.parametrize("decoding", ["sequential", "jacobi"])
def test_tokens_are_told_once_a_latent_frame(decoding: str) -> None:
    told: list[tuple[int, torch.Tensor]] = []
    clips = session(decoding=decoding).generate_many(
        requests(top_p=0.9), on_tokens=lambda clip, tokens: told.append((clip, tokens))
    )
    for number, clip in enumerate(clips):
        parts = [tokens for own, tokens in told if own == number]
        whole = clip.tokens.flatten()
        assert [len(part) // FRAME for part in parts] == [2, 3]
        assert all(torch.equal(part, whole[: len(part)]) for part in parts)
        if decoding == "sequential":
            assert [len(part) for part in parts] == [2 * FRAME, 3 * FRAME]


def test_medusa_heads_are_recorded_of_each_clip_and_all_its_chunks() -> None:
    own = Session(infer_case.random_config(Path("unused"), Path("unused"), decoding="jacobi"))
    config = dataclasses.replace(own._source.config, num_medusa_heads=2)
    own._source = dataclasses.replace(own._source, config=config)
    clips = own.generate_many(requests(top_p=0.9))
    plain = session().generate_many(requests(top_p=0.9))
    for clip, other in zip(clips, plain, strict=True):
        assert torch.equal(clip.tokens, other.tokens)
        assert "medusa_heads" not in other.record
        found = clip.record["medusa_heads"]
        assert len(found["foretold"]) == 2
        pairs = zip(found["right"], found["foretold"], strict=True)
        assert all(0 <= right <= count for right, count in pairs)
    once = own.generate(requests()[0]).record["medusa_heads"]["foretold"]
    twice = own.generate(dataclasses.replace(requests()[0], num_rollout_chunks=2))
    both = twice.record["medusa_heads"]["foretold"]
    assert all(more > count > 0 for more, count in zip(both, once, strict=True))
