"""Clips of several chunks: tokens that are passed on, one causal clip, bounded memory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import infer_case
from helpers.infer_case import HEIGHT, TOKENIZER, WIDTH, random_config

from cosmos_posttrain import load_tokenizer
from cosmos_posttrain.errors import GeometryError
from cosmos_posttrain.inference.batch import run
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.rollout import seed_of_chunk
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.tokenizer import native
from cosmos_posttrain.video import probe, to_uint8


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("rollout")
    video = infer_case.write_input(folder / "bar.mp4")
    return Session(random_config(video, folder, num_context_frames=33))  # 5 latent frames


@pytest.fixture(scope="module")
def given(session: Session) -> torch.Tensor:
    return session.encode(infer_case.moving_bar(9))


@pytest.mark.parametrize("anchor", [True, False])
def test_each_chunk_continues_the_tokens_of_the_one_before(
    session: Session, given: torch.Tensor, anchor: bool
) -> None:
    overlap = 3 - anchor
    request = Request(tokens=given, seed=3, item=4, sample=1, top_p=0.9)
    one = session.generate(request).tokens
    shown: list[int] = []
    seen: list[torch.Tensor] = []
    long = session.generate(
        dataclasses.replace(
            request, num_rollout_chunks=3, rollout_overlap=overlap, rollout_anchor=anchor
        ),
        shown.append,
        lambda _, tokens: seen.append(tokens.clone()),
    )
    assert long.tokens.shape == (5 + 2 + 2, 2, 3)
    assert torch.equal(long.tokens[:5], one)
    for chunk, start in ((1, 2), (2, 4)):
        told = long.tokens[start : start + 3]
        if anchor:
            told = torch.cat([long.tokens[:1], told[1:]])
        seed = seed_of_chunk(3, chunk)
        part = session.generate(dataclasses.replace(request, tokens=told, seed=seed))
        assert torch.equal(part.tokens[3:], long.tokens[start + 3 : start + 5])
    assert (long.num_condition_tokens, long.num_generated_tokens) == (12, 42)
    settings = {"num_rollout_chunks": 3, "rollout_overlap": overlap, "rollout_anchor": anchor}
    assert settings.items() <= long.settings.items()
    assert long.settings["seed"] == 3 and long.settings["num_input_frames"] == 9
    assert shown[-1] == 42 and shown == sorted(shown)
    assert torch.equal(seen[-1], long.tokens.flatten())
    assert all(torch.equal(tokens, seen[-1][: len(tokens)]) for tokens in seen)
    # Where it is not said, each chunk is given as many latent frames as the first.
    long = session.generate(
        dataclasses.replace(request, num_rollout_chunks=2, rollout_anchor=anchor)
    )
    assert long.settings["rollout_overlap"] == 2 - anchor and long.tokens.shape[0] == 5 + 3


def test_it_is_decoded_as_one_clip_and_never_held_whole(
    session: Session, given: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(tokens=given, num_rollout_chunks=4)
    clip = session.generate(request)
    tokenizer = load_tokenizer(TOKENIZER)
    whole = to_uint8(tokenizer.decode(clip.tokens[None])[0])
    monkeypatch.setattr(native, "MAX_CHUNK_FRAMES", 16)
    counts = []
    parts = clip.frame_parts()
    done = 0
    for part in parts:
        counts.append(part.shape[1])
        expected = whole[:, done : done + part.shape[1]]
        assert (part.int() - expected.int()).abs().max() <= 1  # chunks differ by rounding
        done += part.shape[1]
    assert counts == [17, *[16] * 5, 8] and done == whole.shape[1] == 105
    assert clip.seconds["decode"] > 0


def test_how_probable_each_token_was(session: Session, given: torch.Tensor) -> None:
    request = Request(tokens=given, seed=1, top_p=0.9, with_log_probs=True)
    clip = session.generate(request)
    assert clip.log_probs is not None and clip.log_probs.shape == clip.tokens.shape
    assert session._model is not None
    logits = session._model.logits(clip.tokens.flatten()[None])[0]
    expected = logits.log_softmax(-1)[:-1].gather(-1, clip.tokens.flatten()[1:, None])[:, 0]
    found = clip.log_probs.flatten()
    assert torch.isnan(found[:12]).all()
    assert torch.allclose(found[12:], expected[11:], atol=1e-4)  # other order of summation
    long = session.generate(dataclasses.replace(request, num_rollout_chunks=2))
    assert long.log_probs is not None and long.log_probs.shape == long.tokens.shape
    assert not torch.isnan(long.log_probs[2:]).any()
    assert session.generate(Request(tokens=given)).log_probs is None


@pytest.mark.parametrize("overlap", [4, 9])
def test_an_overlap_that_leaves_nothing_is_refused(
    session: Session, given: torch.Tensor, overlap: int
) -> None:
    request = Request(tokens=given, num_rollout_chunks=2, rollout_overlap=overlap)
    with pytest.raises(GeometryError, match=rf"{overlap} beside the anchor leaves.*use 1 to 3"):
        session.generate(request)
    request = dataclasses.replace(request, rollout_overlap=5, rollout_anchor=False)
    with pytest.raises(GeometryError, match=r"5 leaves nothing.*use 1 to 4"):
        session.generate(request)


def test_a_run_of_several_chunks_beside_the_truth(tmp_path: Path) -> None:
    video, out = infer_case.write_input(tmp_path / "bar.mp4", 40), tmp_path / "out"
    config = random_config(
        video,
        out,
        num_rollout_chunks=4,
        rollout_overlap=1,
        side_by_side=True,
        save_tokens=True,
        batch_size=2,
        num_samples=2,
    )
    run(config)
    info = probe(out / "output.mp4")
    # 3 latent frames, and 1 for each further chunk.
    assert (info.num_frames, info.width, info.height) == (1 + 5 * 8, WIDTH, HEIGHT)
    assert probe(out / "output_sample_1.side_by_side.mp4").width == 2 * WIDTH
    tokens = [np.load(out / f"output{name}.tokens.npy") for name in ("", "_sample_1")]
    assert tokens[0].shape == (6, 2, 3)
    assert (tokens[0][:2] == tokens[1][:2]).all() and (tokens[0] != tokens[1]).any()
    record = json.loads((out / "output.json").read_text())
    assert record["num_generated_tokens"] == 4 * 6
    assert "--num_rollout_chunks 4 --rollout_overlap 1" in record["command"]


def test_seeds_of_chunks_are_their_own() -> None:
    seeds = [seed_of_chunk(seed, chunk) for seed in range(20) for chunk in range(20)]
    assert len(set(seeds)) == 400 and min(seeds) >= 0 and max(seeds) < 2**63
