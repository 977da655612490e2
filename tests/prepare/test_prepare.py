"""Preparation: right tokens, the same bytes however it is run, and nothing lost when killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR, run_distributed, run_script
from helpers.prepared import BlockMean, config, contents, make_videos, prepare_small
from helpers.script_here import run_here
from helpers.video_files import grey_frames, write_audio, write_video

from cosmos_posttrain.data import Manifest, TokenDataset
from cosmos_posttrain.errors import (
    ConfigError,
    GeometryError,
    OutputFolderError,
    PartialFailureError,
    TokenizerError,
    UserError,
)
from cosmos_posttrain.prepare.prepare import prepare
from cosmos_posttrain.prepare.sources import clip_starts
from cosmos_posttrain.video import read_clips, to_float


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def reference(videos, tmp_path_factory):
    """The same data set prepared once, without interruption, by one worker."""
    output = tmp_path_factory.mktemp("reference") / "out"
    prepare_small(videos, output, num_workers=1)
    return contents(output)


def test_documents_are_the_tokens_of_the_clips_that_their_rows_name(videos, tmp_path):
    manifest = prepare_small(videos, tmp_path / "out")
    assert (manifest.num_documents, manifest.num_failures, len(manifest.shards)) == (10, 0, 3)
    contract = manifest.contract
    assert (contract.latent_shape, contract.seq_length) == ((3, 2, 3), 18)
    assert (contract.kind, contract.dtype, contract.text_encoder) == ("base", "uint16", None)
    assert contract.tokenizer.sha256 == BlockMean.sha256
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["manifest.json", "sources.npz"]
        + [f"shard-0000{n}.{extension}" for n in range(3) for extension in ("bin", "idx", "jsonl")]
    )
    data = TokenDataset(tmp_path / "out", split="all")
    assert len(data) == 10
    for i in range(len(data)):
        row = data.row(i)
        clip = read_clips(videos / row.source, [row.first_frame], 9, 16, 24)[0]
        expected = BlockMean().encode(to_float(clip.frames[None])).flatten().long()
        assert torch.equal(data[i], expected)
        assert row.fps == 10.0 and row.num_repeated == 0
    assert [data.row(i).first_frame for i in range(4)] == [0, 11, 0, 12]


def test_the_number_of_workers_does_not_change_a_byte(videos, reference, tmp_path):
    prepare_small(videos, tmp_path / "out", num_workers=3)
    assert contents(tmp_path / "out") == reference


def _prepare_on_rank(videos: Path, output: Path) -> int:
    manifest = prepare_small(videos, output)

    return manifest.num_documents


@pytest.mark.distributed
def test_the_number_of_ranks_does_not_change_a_byte(videos, reference, tmp_path):
    assert run_distributed(_prepare_on_rank, 2, videos, tmp_path / "out") == [10, 10]
    assert contents(tmp_path / "out") == reference


class _Interrupted(Exception):
    pass


class _StopsAfter(BlockMean):
    """Raises in the n-th call of the encoder, in the middle of a shard."""

    def __init__(self, num_calls: int) -> None:
        self.left = num_calls

    def encode(self, video):
        self.left -= 1
        if self.left < 0:
            raise _Interrupted
        return super().encode(video)


@pytest.mark.parametrize("num_calls", [0, 1, 3, 4])
def test_an_interrupted_run_continues_to_the_same_bytes(videos, reference, tmp_path, num_calls):
    output = tmp_path / "out"
    with pytest.raises(_Interrupted):
        prepare(config(videos, output), _StopsAfter(num_calls))
    with pytest.raises(UserError, match="not complete"):
        TokenDataset(output)
    kept = {name: data for name, data in contents(output).items() if name.endswith(".bin")}
    assert len(kept) == num_calls // 2
    prepare(config(videos, output), _StopsAfter(5 - len(kept) * 2))  # no finished shard again
    assert contents(output) == reference


KILLED_RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from helpers.prepared import BlockMean, config
from cosmos_posttrain.prepare.prepare import prepare

class Slow(BlockMean):
    def encode(self, video):
        time.sleep(0.5)
        return super().encode(video)

prepare(config(Path({videos!r}), Path({output!r})), Slow())
"""


def test_a_killed_process_is_continued_to_the_same_bytes(videos, reference, tmp_path):
    output = tmp_path / "out"
    script = tmp_path / "run.py"
    tests = str(REPOSITORY_DIR / "tests")
    script.write_text(KILLED_RUN.format(tests=tests, videos=str(videos), output=str(output)))
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY_DIR)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        deadline = time.monotonic() + 60
        while not (output / "shard-00000.json").is_file():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (output / "manifest.json").exists()
    (output / ".tmp-4321-shard-00001.bin").write_bytes(b"half")  # left by a kill
    prepare_small(videos, output)
    assert contents(output) == reference


def test_a_finished_shard_that_lost_a_file_is_made_again(videos, reference, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(_Interrupted):
        prepare(config(videos, output), _StopsAfter(4))
    (output / "shard-00000.idx").unlink()
    prepare_small(videos, output)
    assert contents(output) == reference


def test_output_folder_rules(videos, reference, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    prepare_small(videos, output)  # empty: start
    prepare_small(videos, output)  # complete: say so
    assert "complete already" in capsys.readouterr().out
    assert contents(output) == reference
    for changes in ({"height": 24}, {"clips_per_video": "1"}, {"videos_per_shard": 3}):
        with pytest.raises(OutputFolderError, match="another data set"):
            prepare_small(videos, output, **changes)
        assert contents(output) == reference
    manifest = prepare_small(videos, output, height=24, overwrite=True)
    assert manifest.contract.clip.height == 24
    prepare_small(videos, output, overwrite=True)
    assert contents(output) == reference


def test_a_folder_with_something_else_is_left_alone(videos, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    (output / "shard-00000.bin").write_bytes(b"whose?")
    before = contents(tmp_path)
    with pytest.raises(OutputFolderError, match=r"something else \(thesis.tex\)"):
        prepare_small(videos, output)
    with pytest.raises(OutputFolderError, match="is a file"):
        prepare_small(videos, output / "thesis.tex")
    assert contents(tmp_path) == before
    prepare_small(videos, output, overwrite=True)  # deletes what is ours, and only that
    assert (output / "thesis.tex").read_text() == "years of work"
    assert len(TokenDataset(output, split="all")) == 10


def test_changed_videos_are_another_data_set(tmp_path):
    videos = make_videos(tmp_path / "videos", 3)
    prepare_small(videos, tmp_path / "out")
    write_video(videos / "3.mp4", grey_frames(12))
    with pytest.raises(OutputFolderError, match="num_sources 4 here, 3 there"):
        prepare_small(videos, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"width": 20}, GeometryError, "use 16 or 24"),
        ({"num_context_frames": 16}, GeometryError, "use 13 or 17"),
        ({"input_videos_dir": "/nowhere"}, UserError, "does not exist"),
        ({"input_jsonl": "x.jsonl"}, ConfigError, "one of"),
        ({"output_prefix": ""}, ConfigError, "--output_prefix"),
        (
            {"num_workers": 0, "batch_size": 0},
            ConfigError,
            "--num_workers 0 must.*--batch_size 0 must",
        ),
        ({"clips_per_video": "some"}, ConfigError, "neither a number"),
        ({"max_failures": -1}, ConfigError, "at least 0"),
        ({"tokenizer_compression_factor": "8,8,8"}, TokenizerError, "make them agree"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    videos, tmp_path, changes, error, words
):
    with pytest.raises(error, match=words) as caught:
        prepare_small(videos, tmp_path / "out", **changes)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def _with_bad_files(folder: Path) -> Path:
    make_videos(folder, 3)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    whole = write_video(folder / "z-whole.mp4", grey_frames(30))
    (folder / "sub").mkdir()
    (folder / "sub" / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()
    write_audio(folder / "sound.mp4")
    (folder / ".hidden.mp4").write_text("ignored")
    return folder


def test_unreadable_videos_are_named_and_the_others_are_kept(tmp_path, capsys):
    videos = _with_bad_files(tmp_path / "videos")
    with pytest.raises(PartialFailureError, match="4 of 7 videos") as caught:
        prepare_small(videos, tmp_path / "out")
    assert caught.value.exit_code == 1
    manifest = Manifest.load(tmp_path / "out")
    reasons = {failure.source: failure.reason for failure in manifest.failures}
    assert set(reasons) == {"empty.mp4", "text.mp4", "sub/cut.mp4", "sound.mp4"}
    for source, words in [
        ("empty.mp4", "is empty"),
        ("text.mp4", "holds text"),
        ("sub/cut.mp4", "truncated"),
        ("sound.mp4", "no video stream"),
    ]:
        assert words in reasons[source]
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert {json.loads(line)["source"] for line in lines} == set(reasons)
    data = TokenDataset(tmp_path / "out", split="all")
    assert sorted({data.source(i) for i in range(len(data))}) == ["0.mp4", "1.mp4", "2.mp4"]
    assert [len(data[i]) for i in range(len(data))] == [18] * 6
    with pytest.raises(PartialFailureError):  # complete, but the verdict is the same
        prepare_small(videos, tmp_path / "out")
    assert prepare_small(videos, tmp_path / "out", max_failures=4).num_failures == 4
    assert "text.mp4" in capsys.readouterr().err


def test_a_video_that_breaks_half_way_leaves_no_clip_behind(tmp_path):
    videos = make_videos(tmp_path / "videos", 2)
    good = write_video(tmp_path / "whole.mov", grey_frames(60), "png", "rgb24")
    data = bytearray(good.read_bytes())
    start = data.index(b"IDAT", len(data) // 2)
    data[start : start + 40] = bytes(40)
    (videos / "broken.mov").write_bytes(data)
    with pytest.raises(PartialFailureError):
        prepare_small(videos, tmp_path / "out", clips_per_video="all", videos_per_shard=3)
    manifest = Manifest.load(tmp_path / "out")
    assert [failure.source for failure in manifest.failures] == ["broken.mov"]
    assert "cannot be decoded after frame" in manifest.failures[0].reason
    clips = TokenDataset(tmp_path / "out", split="all")
    assert {clips.source(i) for i in range(len(clips))} == {"0.mp4", "1.mp4"}
    assert [clips.row(i).document for i in range(len(clips))] == list(range(4))


def test_nothing_readable_is_a_failure_whatever_is_allowed(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    with pytest.raises(PartialFailureError, match="no clip"):
        prepare_small(tmp_path / "videos", tmp_path / "out", max_failures=9)
    with pytest.raises(UserError, match="holds no clip"):
        TokenDataset(tmp_path / "out")


def test_jsonl_input_keeps_prompts_and_relative_paths(tmp_path, capsys):
    videos = make_videos(tmp_path / "videos", 2)
    lines = [
        {"visual_input": "videos/1.mp4", "prompt": "grün wird grau"},
        {"visual_input": str(videos / "0.mp4")},
        {"visual_input": "videos/missing.mp4"},
    ]
    path = tmp_path / "input.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    changes = {"input_videos_dir": None, "input_jsonl": str(path), "max_failures": 1}
    manifest = prepare_small(videos, tmp_path / "out", clips_per_video="1", **changes)
    assert manifest.failures[0].source == "videos/missing.mp4"
    assert "note: 1 of 3 videos have a prompt, which is not encoded" in capsys.readouterr().out
    data = TokenDataset(tmp_path / "out", split="all")
    assert [data.row(i).prompt for i in range(2)] == ["grün wird grau", None]
    for bad in ("[]", '{"visual_input": 3}', "{", '{"visual_input": "a", "prompt": 1}'):
        path.write_text(json.dumps(lines[0]) + "\n" + bad + "\n")
        with pytest.raises(UserError, match=r"line 2 of .*input.jsonl"):
            prepare_small(videos, tmp_path / "new", **changes)
    path.write_text("")
    with pytest.raises(UserError, match="is empty"):
        prepare_small(videos, tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_seed_shuffles_and_short_videos_repeat_their_last_frame(tmp_path):
    videos = make_videos(tmp_path / "videos", 4, num_frames=6)
    prepare_small(videos, tmp_path / "a", seed=1, videos_per_shard=8)
    data = TokenDataset(tmp_path / "a", split="all")
    sources = [data.source(i) for i in range(len(data))]
    assert sources != sorted(sources) and len(sources) == 4
    repeated = {data.source(i): data.row(i).num_repeated for i in range(4)}
    assert repeated == {"0.mp4": 3, "1.mp4": 2, "2.mp4": 1, "3.mp4": 0}


@pytest.mark.parametrize(
    ("num_video_frames", "span", "clips", "starts"),
    [
        (60, 17, 1, [0]),
        (60, 17, 2, [0, 43]),
        (60, 17, 3, [0, 21, 43]),
        (60, 17, 5, [0, 10, 21, 32, 43]),
        (60, 17, None, [0, 17, 34]),
        (17, 17, None, [0]),
        (9, 17, None, [0]),
        (9, 17, 4, [0]),
        (18, 17, 4, [0, 1]),
    ],
)
def test_clip_starts(num_video_frames, span, clips, starts):
    assert clip_starts(num_video_frames, span, clips) == starts


def test_clips_do_not_overlap_where_there_is_room():
    for num_frames in range(10, 200, 7):
        for clips in range(2, 9):
            starts = clip_starts(num_frames, 10, clips)
            assert starts[-1] == num_frames - 10
            if num_frames >= 10 * clips:
                assert len(starts) == clips
                assert all(b - a >= 10 for a, b in pairwise(starts))


SCRIPT = [
    "prepare_dataset.py",
    *"--width 32 --height 16 --num_context_frames 9 --tokenizer_compression_factor 4,8,8".split(),
    *"--encoder_path tiny-dv4x8x8 --decoder_path tiny-dv4x8x8 --videos_per_shard 2".split(),
]


@pytest.mark.distributed
def test_the_script_under_python_and_torchrun(tmp_path):
    videos = make_videos(tmp_path / "videos", 3)
    (videos / "empty.mp4").write_bytes(b"")
    common = [*SCRIPT, "--input_videos_dir", videos]
    plain = run_script([*common, "--output_prefix", tmp_path / "one"])
    assert plain.returncode == 1, plain.stderr
    assert "error: 1 of 4 videos could not be read" in plain.stderr
    assert "Traceback" not in plain.stderr
    twin = run_script([*common, "--output_dir", tmp_path / "two", "--max_failures", 1], nproc=2)
    assert twin.returncode == 0, twin.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert len(TokenDataset(tmp_path / "two", split="all")) == 3


def test_the_script_refuses_a_folder_of_other_things(tmp_path, monkeypatch, capsys):
    videos = make_videos(tmp_path / "videos", 3)
    command = [*SCRIPT[1:], "--input_videos_dir", videos, "--output_prefix", videos]
    code, said = run_here(SCRIPT[0], command, monkeypatch, capsys)
    assert code == 2 and said.count("\n") == 1
    assert "something else" in said
