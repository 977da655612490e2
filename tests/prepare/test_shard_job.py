"""A shard is a function of its inputs; a source is read, rejected or failed, and nothing else."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import threading

import pytest
import torch
from helpers.prepared import BlockMean, config, contents, make_videos
from helpers.video_files import grey_frames, write_video

from cosmos_posttrain.data import Manifest
from cosmos_posttrain.errors import CosmosPosttrainError, PartialFailureError, VideoError
from cosmos_posttrain.prepare import decoding
from cosmos_posttrain.prepare.decoding import ClipSpec, DecodingPool, read_source
from cosmos_posttrain.prepare.encoders import PreparationEncoders
from cosmos_posttrain.prepare.prepare import Preparation, prepare
from cosmos_posttrain.prepare.shard_job import SourceRejectedError
from cosmos_posttrain.prepare.sources import VideoSource

SPEC = ClipSpec(9, 16, 24, 1, 2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"))


def jobs_of(videos, output, **changes):
    settings = config(videos, output, **changes)
    preparation = Preparation(settings, PreparationEncoders(settings, BlockMean()))
    jobs = preparation.start()
    assert jobs is not None
    return preparation, jobs


def test_a_shard_does_not_depend_on_who_runs_it_or_beside_what(videos, tmp_path):
    prepare(config(videos, tmp_path / "whole"), BlockMean())
    preparation, jobs = jobs_of(videos, tmp_path / "out")
    for job in reversed(jobs):  # in another order, without decoding ahead, and twice
        first = job.run(BlockMean(), lambda source: read_source(source, SPEC))
        assert job.run(BlockMean(), lambda source: read_source(source, SPEC)) == first
    preparation.finish()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_sources_are_read_rejected_or_failed(videos, tmp_path, monkeypatch, capsys):
    def read(self, source, plain=DecodingPool.read):
        clips = plain(self, source)
        if source.name in ("1.mp4", "3.mp4"):
            next(clips)  # the filter looks at the first clip
            raise SourceRejectedError("no motion")
        if source.name == "0.mp4":
            raise SourceRejectedError("too dark")
        if source.name == "2.mp4":
            raise VideoError("2.mp4 is broken.")
        yield from clips

    monkeypatch.setattr(DecodingPool, "read", read)
    with pytest.raises(PartialFailureError, match="1 of 5 videos"):
        prepare(config(videos, tmp_path / "out"), BlockMean())
    manifest = prepare(config(videos, tmp_path / "out", max_failures=1), BlockMean())
    assert manifest.rejected == {"no motion": 2, "too dark": 1}
    assert [failure.source for failure in manifest.failures] == ["2.mp4"]
    assert manifest.num_documents == 2
    assert "prepared 2 clips from 1 videos" in capsys.readouterr().out
    assert Manifest.load(tmp_path / "out") == manifest


def test_a_source_that_is_left_early_does_not_hold_a_decoder(tmp_path):
    long = write_video(tmp_path / "long.mp4", grey_frames(90, 32, 48))
    sources = [VideoSource(str(n), long) for n in range(6)]
    every = dataclasses.replace(SPEC, clips_per_video=None)  # ten clips, two of them ahead
    with DecodingPool(sources, every, num_workers=2, clips_ahead=2) as pool:
        for source in sources[:-1]:
            clips = pool.read(source)
            assert next(clips).start_frame == 0
            clips.close()
        assert len(list(pool.read(sources[-1]))) == 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_whatever_ends_a_decoder_reaches_the_consumer(videos, monkeypatch):
    def fail(source, spec):
        raise SystemExit("unheard of")
        yield

    monkeypatch.setattr(decoding, "read_source", fail)
    source = VideoSource("0.mp4", videos / "0.mp4")
    with DecodingPool([source], SPEC, 1, 2) as pool, pytest.raises(SystemExit, match="unheard of"):
        next(pool.read(source))


class _UsesUpFiles(BlockMean):
    """After two shards nothing more can be opened, until ``limit`` is given back."""

    def __init__(self) -> None:
        self.left = 3
        self.limit = resource.getrlimit(resource.RLIMIT_NOFILE)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, self.limit[1]))
        return super().encode(video)


def test_the_machines_faults_are_no_failures_of_videos(videos, tmp_path):
    prepare(config(videos, tmp_path / "whole"), BlockMean())
    settings = {"num_workers": 1, "batch_size": 1, "videos_per_shard": 1}
    encoder = _UsesUpFiles()
    try:
        with pytest.raises(CosmosPosttrainError, match="give the same command again") as caught:
            prepare(config(videos, tmp_path / "out", **settings), encoder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, encoder.limit)
    assert caught.value.exit_code == 1 and "oo many open files" in str(caught.value)
    manifest = prepare(config(videos, tmp_path / "out", **settings), BlockMean())
    assert manifest.num_failures == 0 and manifest.num_documents == 10


def test_errors_of_a_network_are_recognised_through_their_causes(videos, monkeypatch):
    def lose(*arguments):
        try:
            raise OSError(errno.ESTALE, "Stale file handle")
        except OSError as error:
            raise VideoError("cannot be opened") from error

    monkeypatch.setattr(decoding, "iter_clips", lose)
    one = dataclasses.replace(SPEC, clips_per_video=1)
    with pytest.raises(CosmosPosttrainError, match=r"could not be read now [(]Stale file handle"):
        list(read_source(VideoSource("0.mp4", videos / "0.mp4"), one))


def test_names_that_are_not_utf8_are_failures_and_no_crash(tmp_path):
    make_videos(tmp_path / "videos", 2)
    whole = tmp_path / "videos" / "0.mp4"
    bad = os.fsencode(tmp_path / "videos") + b"/caf\xe9.mp4"
    os.link(whole, bad)
    output = tmp_path / "out"
    with pytest.raises(PartialFailureError, match="1 of 3"):
        prepare(config(tmp_path / "videos", output), BlockMean())
    failure = Manifest.load(output).failures[0]
    assert failure.source == "caf\\udce9.mp4" and "not UTF-8" in failure.reason
    assert "caf" in (output / "failures.jsonl").read_text()
