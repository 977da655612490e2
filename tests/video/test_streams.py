"""Which of a file's video streams is read."""

from __future__ import annotations

import av
import numpy as np
import pytest
from av.stream import Disposition
from helpers.video_files import disable_tracks, frame_numbers, grey_frames, write_streams

from cosmos_posttrain.video import VideoError, probe, read_clips

BLACK_SMALL = [np.zeros((180, 320, 3), np.uint8)] * 40
GREY_LARGE = grey_frames(40, 270, 480)


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("large_first", [True, False])
def test_the_best_of_two_streams_is_read(tmp_path, codec, large_first):
    """As in files with renditions: all flagged as default, so the bit rate decides."""
    streams = [(GREY_LARGE, Disposition.default), (BLACK_SMALL, Disposition.default)]
    path = write_streams(tmp_path / "a.mp4", streams[:: 1 if large_first else -1], codec)
    info = probe(path)
    assert (info.num_frames, info.height, info.width) == (40, 270, 480)
    clips = read_clips(path, [30, 0], 3, 27, 48)
    assert [frame_numbers(clip.frames) for clip in clips] == [[30, 31, 32], [0, 1, 2]]


@pytest.mark.parametrize(
    ("name", "large", "small", "chosen"),
    [
        ("a.mp4", Disposition(0), Disposition.default, 320),
        ("a.mkv", Disposition(0), Disposition.visual_impaired, 480),
        ("a.mkv", Disposition(0), Disposition(0), 320),  # nothing tells them apart: the first
    ],
)
def test_flags_of_streams_count_as_for_ffmpeg(tmp_path, name, large, small, chosen):
    path = write_streams(tmp_path / name, [(BLACK_SMALL, small), (GREY_LARGE, large)])
    assert probe(path).width == chosen
    with av.open(str(path)) as container:
        assert container.streams.best("video").width == chosen


@pytest.mark.parametrize("flags", [Disposition.default, Disposition.visual_impaired])
def test_a_cover_picture_is_no_video(tmp_path, flags):
    """Also where FFmpeg calls it the best stream: beside tracks that are off and for the blind."""
    cover = np.random.default_rng(0).integers(0, 255, (600, 600, 3)).astype(np.uint8)
    streams = [(BLACK_SMALL, flags), (GREY_LARGE, flags)]
    path = write_streams(tmp_path / "a.mp4", streams, cover=cover)
    if flags == Disposition.visual_impaired:
        disable_tracks(path)
        with av.open(str(path)) as container:
            assert container.streams.best("video").width == 600
    assert probe(path).width == 480
    assert frame_numbers(read_clips(path, [7], 2, 27, 48)[0].frames) == [7, 8]
    only = write_streams(tmp_path / "only.mp4", [], cover=cover)
    with pytest.raises(VideoError, match="has no video stream"):
        probe(only)
