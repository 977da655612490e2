"""Two writers, full disks, killed launchers and ranks: nothing is spoilt, and it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from helpers.distributed_run import REPOSITORY_DIR, kill_tree, run_distributed
from helpers.full_disk import no_file_beyond
from helpers.prepared import contents, make_videos, prepare_small

from cosmos_posttrain import launch
from cosmos_posttrain.data import Manifest
from cosmos_posttrain.errors import CosmosPosttrainError, OutputFolderError, SaveError
from cosmos_posttrain.prepare import prepare as preparing

# Stops in the middle of its second shard until it is killed; ends as the real script does.
SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.prepared import BlockMean, config
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.prepare.prepare import prepare

class StopsInSecondShard(BlockMean):
    calls = 0

    def encode(self, video):
        self.calls += 1
        while self.calls == 2:
            time.sleep(1)
        return super().encode(video)

def main():
    videos, output = map(Path, sys.argv[1:])
    prepare(config(videos, output, videos_per_shard=1), StopsInSecondShard())

if __name__ == "__main__":
    run_cli(main)
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def whole(videos, tmp_path_factory):
    """What an undisturbed run writes."""
    output = tmp_path_factory.mktemp("whole") / "out"
    prepare_small(videos, output, videos_per_shard=1)
    return contents(output)


@contextmanager
def started(folder: Path, videos: Path, nproc: int = 1) -> Iterator[subprocess.Popen[str]]:
    """A preparation of ``folder / "out"`` in which each process has finished one shard."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(REPOSITORY_DIR / "tests")))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    words = [*(launcher if nproc > 1 else []), str(script), str(videos), str(folder / "out")]
    with subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY_DIR), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not all((folder / f"out/shard-0000{n}.json").exists() for n in range(nproc)):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield process
        finally:
            kill_tree(process.pid)


@pytest.mark.slow
def test_a_second_preparation_of_the_folder_is_refused(videos, whole, tmp_path):
    output = tmp_path / "out"
    with started(tmp_path, videos) as first:
        for changes in ({}, {"overwrite": True}, {"height": 24, "overwrite": True}):
            with pytest.raises(OutputFolderError) as caught:
                prepare_small(videos, output, videos_per_shard=1, **changes)
            assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
            assert f"being written by another process (process {first.pid} on" in str(caught.value)
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (output / ".lock").exists()  # of a process that is gone: it holds nobody back
    prepare_small(videos, output, videos_per_shard=1)
    assert contents(output) == whole


@pytest.mark.distributed
@pytest.mark.parametrize("victim", ["launcher", pytest.param("1", marks=pytest.mark.slow)])
def test_a_killed_launcher_or_rank_ends_all_and_the_command_goes_on(
    videos, whole, tmp_path, victim, capsys
):
    output = tmp_path / "out"
    with started(tmp_path, videos, nproc=2) as launcher:
        children = psutil.Process(launcher.pid).children(recursive=True)
        ranks = {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}
        assert sorted(ranks) == ["0", "1"]
        (launcher if victim == "launcher" else ranks[victim]).kill()
        launcher.wait(timeout=30)
        _, alive = psutil.wait_procs(ranks.values(), timeout=5)
        assert alive == []
    assert launcher.returncode != 0 and not (output / "manifest.json").exists()
    prepare_small(videos, output, videos_per_shard=1)
    assert "2 shards are done" in capsys.readouterr().out
    assert contents(output) == whole


def _prepare_with_small_files(videos: Path, output: Path) -> tuple[int, str]:
    """Prepares where no file may have more than 2,000 bytes."""
    try:
        with no_file_beyond(2000):
            prepare_small(videos, output, clips_per_video="all")
    except SaveError as error:
        return error.exit_code, str(error)
    return 0, ""


def test_a_full_disk_is_one_sentence_and_the_command_goes_on(tmp_path, capsys):
    """The limit on the size of files is met in the second shard, as a disk's end would be."""
    videos, output = tmp_path / "videos", tmp_path / "out"
    make_videos(videos, 2)
    make_videos(videos / "z", 2, num_frames=600)
    ((code, sentence),) = run_distributed(_prepare_with_small_files, 1, videos, output)
    assert code == 1 and sentence.startswith(f"{output} could not be written to: File too large")
    assert "finished shards stay" in sentence and "\n" not in sentence
    names = {path.name for path in output.iterdir()}
    assert names == {"prepare.json", *(f"shard-00000.{e}" for e in ("bin", "idx", "jsonl", "json"))}
    prepare_small(videos, output, clips_per_video="all")
    assert "1 shards are done" in capsys.readouterr().out
    prepare_small(videos, tmp_path / "whole", clips_per_video="all")
    assert contents(output) == contents(tmp_path / "whole")


def _plan_on_rank_zero(videos: Path, output: Path) -> tuple[int, int, str]:
    if launch.rank():
        preparing.from_folder = preparing.sources_sha256 = None  # type: ignore[assignment]
    manifest = prepare_small(videos, output, videos_per_shard=1)
    again = prepare_small(videos, output, videos_per_shard=1)
    try:
        prepare_small(videos / "nowhere", output.parent / "no")
    except CosmosPosttrainError as error:
        return manifest.num_documents, again.num_documents, f"{type(error).__name__}: {error}"
    return manifest.num_documents, again.num_documents, "no error"


@pytest.mark.distributed
def test_rank_zero_lists_the_sources_and_all_hear_of_its_errors(videos, tmp_path):
    results = run_distributed(_plan_on_rank_zero, 3, videos, tmp_path / "out")
    assert len(results) == 3 and len(set(results)) == 1
    assert results[0][:2] == (10, 10) and "UserError: the video folder" in results[0][2]
    assert not (tmp_path / "no").exists()


def test_a_run_that_was_killed_after_its_manifest_is_tidied(videos, tmp_path):
    output = tmp_path / "out"
    prepare_small(videos, output)
    whole = contents(output)
    manifest = Manifest.load(output)
    (output / "prepare.json").write_text("{}")
    (output / "shard-00001.json").write_text("{}")
    assert prepare_small(videos, output) == manifest
    assert contents(output) == whole
