"""Requests: the same clip as a file, as frames and as tokens; what is refused; lazy frames."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import infer_case
from helpers.infer_case import FRAMES, HEIGHT, LATENT_SHAPE, WIDTH

from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError, GeometryError
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.video import read_clips


@cache
def session() -> Session:
    return Session(infer_case.random_config(Path("unused"), Path("unused")))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return infer_case.write_input(tmp_path_factory.mktemp("input") / "bar.mp4")


def test_a_file_its_frames_and_its_tokens_are_the_same_request(video: Path) -> None:
    frames = read_clips(video, [0], 9, HEIGHT, WIDTH)[0].frames
    tokens = session().encode(frames)
    assert tokens.shape == (2, *LATENT_SHAPE[1:])
    settings: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "seed": 5}
    results = [
        session().generate(Request(**given, **settings))
        for given in ({"path": video}, {"frames": frames}, {"tokens": tokens.to(torch.int32)})
    ]
    first = results[0]
    assert first.tokens.shape == tuple(LATENT_SHAPE)
    assert torch.equal(first.tokens[:2], tokens)
    for result in results:
        assert torch.equal(result.tokens, first.tokens)
        assert (result.num_condition_tokens, result.num_generated_tokens) == (12, 6)
        assert result.settings["num_input_frames"] == 9
    # The file says its rate; frames and tokens have none.
    assert [result.fps for result in results] == [12.0, 25.0, 25.0]
    assert len({json.dumps(result.settings) for result in results}) == 3


def test_frames_are_decoded_when_they_are_asked_for_and_once(video: Path) -> None:
    result = session().generate(Request(path=str(video), num_input_frames=1))
    assert "decode" not in result.record["seconds"]
    frames = result.frames
    assert frames.shape == (3, FRAMES, HEIGHT, WIDTH) and frames.dtype == torch.uint8
    assert torch.equal(frames, session().decode(result.tokens))
    assert result.frames is frames
    record = json.loads(json.dumps(result.record))
    assert record["seconds"].keys() == {"encode", "generate", "decode"}
    assert record["settings"]["input"] == str(video)


def test_progress_counts_the_tokens(video: Path) -> None:
    counts: list[int] = []
    session().generate(Request(path=video), counts.append)
    assert counts == sorted(set(counts)) and counts[-1] == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one input"),
        ({"path": Path("a.mp4"), "tokens": torch.zeros(1, 2, 3)}, "one input"),
        ({"tokens": torch.zeros(1, 2, 3), "num_input_frames": 9}, "num_input_frames 9"),
        ({"path": Path("a.mp4"), "temperature": -1.0}, r"temperature -1\.0"),
        ({"path": Path("a.mp4"), "top_p": 1.5}, r"top_p 1\.5"),
        ({"path": Path("a.mp4"), "top_k": 0}, "top_k 0"),
    ],
)
def test_a_bad_request_cannot_be_made(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": Path("a.mp4"), "num_input_frames": 8}, "8 input frames cannot be encoded"),
        ({"path": Path("a.mp4"), "num_input_frames": 17}, "leave nothing to generate"),
        ({"frames": torch.zeros(3, 8, 32, 48, dtype=torch.uint8)}, "8 input frames"),
        ({"frames": torch.zeros(3, 9, 32, 64, dtype=torch.uint8)}, r"takes \(3, T, 32, 48\)"),
        ({"frames": torch.zeros(3, 9, 32, 48)}, r"takes \(3, T, 32, 48\) torch.uint8"),
        ({"frames": torch.zeros(3, dtype=torch.uint8)}, r"the given frames are \(3,\)"),
        ({"tokens": torch.zeros(2, 2, 3)}, r"takes \(T, 2, 3\) torch.int64"),
        ({"tokens": torch.zeros(2, 3, 3, dtype=torch.int64)}, r"takes \(T, 2, 3\)"),
        ({"tokens": torch.zeros(3, 2, 3, dtype=torch.int64)}, "leave nothing to generate"),
        ({"tokens": torch.zeros(0, 2, 3, dtype=torch.int64)}, r"the given tokens are \(0, 2, 3\)"),
        ({"tokens": torch.full((2, 2, 3), 1000)}, "outside the model's vocabulary"),
    ],
)
def test_a_request_that_does_not_fit_the_session_is_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(GeometryError, match=message):
        session().generate(Request(**values))


def test_a_session_goes_on_after_a_request_that_failed(video: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(CosmosPosttrainError, match=r"broken\.mp4"):
        session().generate(Request(path=tmp_path / "broken.mp4"))
    assert session().generate(Request(path=video)).tokens.shape == tuple(LATENT_SHAPE)
