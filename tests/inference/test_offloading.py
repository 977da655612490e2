"""What ``--offload_*`` frees, counted on real objects; test_infer_gpu.py counts bytes."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from helpers import infer_case
from helpers.distributed_run import run_distributed
from helpers.infer_case import random_config

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.inference.memory import Peaks
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.tokenizer.network import DVNetwork

# A tokenizer holds its network and, in float32, the folded one.
NETWORKS = 2


class Count:
    """Networks that were made since, and are alive; cycles do not count as freed."""

    def __init__(self) -> None:
        gc.collect()
        self._others = weakref.WeakSet(self._all())

    @staticmethod
    def _all() -> list[DVNetwork]:
        return [thing for thing in gc.get_objects() if type(thing) is DVNetwork]

    def __call__(self) -> int:
        return sum(network not in self._others for network in self._all())


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return infer_case.write_input(tmp_path / "bar.mp4")


@pytest.mark.parametrize("offload", [False, True])
def test_a_freed_tokenizer_is_gone_while_tokens_are_generated(
    tmp_path: Path, video: Path, offload: bool
) -> None:
    count = Count()
    session = Session(random_config(video, tmp_path, offload_tokenizer=offload))
    assert count() == NETWORKS
    during: list[int] = []
    for _ in range(2):
        result = session.generate(Request(path=video), lambda _: during.append(count()))
        assert count() == (0 if offload else NETWORKS)
        assert result.frames.dtype == torch.uint8
        assert count() == NETWORKS
    assert set(during) == {0 if offload else NETWORKS}
    del session, result
    assert count() == 0


def test_a_model_has_one_owner(tmp_path: Path, video: Path) -> None:
    session = Session(random_config(video, tmp_path))
    session.generate(Request(path=video))
    assert session._model is not None
    weights = weakref.ref(session._model.module)
    del session
    gc.collect()  # Megatron's modules refer to one another
    assert weights() is None


def networks_of_rank(video: Path, folder: Path) -> list[int]:
    """Networks alive on this rank after opening, after loading, and after a clip."""
    groups.initialize(groups.Parallelism(tensor=2))
    count = Count()
    session = Session(random_config(video, folder, tensor_model_parallel_size=2))
    counts = [count()]
    session.load()
    counts.append(count())
    result = session.generate(Request(path=video))
    if session.is_first:
        assert result.frames.shape[1] == infer_case.FRAMES
    return [*counts, count()]


@pytest.mark.distributed
def test_ranks_that_never_decode_keep_no_tokenizer(tmp_path: Path, video: Path) -> None:
    first, second = run_distributed(networks_of_rank, 2, video, tmp_path)
    assert first == [NETWORKS] * 3
    assert second == [NETWORKS, 0, 0]


def test_every_stage_has_a_peak_and_none_sees_what_was_freed(tmp_path: Path, video: Path) -> None:
    count = Count()
    session = Session(random_config(video, tmp_path, offload_tokenizer=True))
    assert session.peaks.num_bytes == {} and session.peaks.text == ""
    session.load()
    assert count() == 0
    session.generate(Request(path=video, num_rollout_chunks=3, rollout_overlap=1))
    # Loaded for the first chunk alone: the others are given tokens.
    assert count() == 0
    assert list(session.peaks.num_bytes) == ["encode", "generate"]


def test_peaks_are_those_of_their_stage() -> None:
    peaks = Peaks()
    size = 300_000_000
    with peaks.stage("before"):
        pass
    if not peaks.num_bytes:
        pytest.skip("this system does not tell a process's peak")
    with peaks.stage("outer"), peaks.stage("large"):
        held = torch.ones(size, dtype=torch.uint8)
    del held
    with peaks.stage("after"):
        pass
    found = peaks.num_bytes
    assert found["large"] - found["before"] > 0.9 * size
    assert found["outer"] >= found["large"]
    # The block is given back at once (it is mapped by itself), and the peak begins anew.
    assert found["large"] - found["after"] > 0.9 * size
    assert peaks.text.startswith("peak memory") and "large" in peaks.text
