"""A rank that is killed, stopped or stuck: the others end within a minute and say which it was."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
from helpers.distributed_run import run_distributed
from helpers.launched_run import LaunchedRun
from helpers.run_case import losses, make_config, run

TWO = ("--standalone", "--nproc_per_node=2")


def command(tokens: Path, log_dir: Path, *more: str, max_steps: int = 4000) -> list[str]:
    return [
        *("train_general.py", "--model_path", "random:tiny", "--split_string", "3,1,1"),
        *("--tensor_model_parallel_size", "1", "--global_batch_size", "4", "--num_threads", "1"),
        *("--lr", "1e-3", "--max_steps", str(max_steps), "--save_every_n_steps", "10"),
        *("--async_save", "--keep_last_n", "2", "--limit_val_batches", "1"),
        *("--data_path", str(tokens), "--log_dir", str(log_dir), *more),
    ]


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"error( on rank \d+)?: ", line)]


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_others_with_its_name(
    tokens: Path, tmp_path: Path, rank: int
) -> None:
    with LaunchedRun(command(tokens, tmp_path / "run"), tmp_path / "run", *TWO) as launched:
        launched.wait_for_steps(5)
        process, started = launched.signal(rank, signal.SIGKILL), time.monotonic()
        assert launched.wait(60) == 1
    assert time.monotonic() - started < 60
    (said,) = errors(launched.output)
    assert f": rank {rank} (process {process} on " in said
    assert "has ended before the others: it was killed, or says itself why" in said
    assert "trainer.py" not in launched.output  # torchrun has a traceback of its own, we have none


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stopped_rank_is_named_after_the_timeout(tokens: Path, tmp_path: Path) -> None:
    argv = command(tokens, tmp_path / "run", "--distributed_timeout_minutes", "0.25")
    with LaunchedRun(argv, tmp_path / "run", *TWO) as launched:
        launched.wait_for_steps(5)
        process = launched.signal(1, signal.SIGSTOP)
        # 15 seconds, and the 30 that torchrun gives the stopped one to end.
        assert launched.wait(120) == 1
    (said,) = errors(launched.output)
    assert f": rank 1 (process {process} on " in said and "was stopped " in said
    assert "the others have waited for 0.25 minutes (--distributed_timeout_minutes)" in said


STOPPED = """
import os, signal
from cosmos_posttrain import cli, launch
from cosmos_posttrain.distributed.watch import RankWatch
from cosmos_posttrain.training.config import FLAGS, TrainConfig
from cosmos_posttrain.training.trainer import train

if launch.rank() == 1:
    RankWatch._work = lambda self: os.kill(os.getpid(), signal.SIGSTOP)
launch.run_cli(lambda: train(cli.parse(TrainConfig, FLAGS, None, "", "")) and None)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_stopped_before_it_told_anything_is_named(tokens: Path, tmp_path: Path) -> None:
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    _, *arguments = command(tokens, tmp_path / "run", "--distributed_timeout_minutes", "0.25")
    with LaunchedRun([script, *arguments], tmp_path / "run", *TWO) as launched:
        assert launched.wait(120) == 1
    (said,) = errors(launched.output)
    assert ": rank 1 (process " in said and "was stopped at its start, in unknown code" in said


STUCK = """
import sys, time
from cosmos_posttrain import cli, launch
from cosmos_posttrain.data import dataset
from cosmos_posttrain.training.config import FLAGS, TrainConfig
from cosmos_posttrain.training.trainer import train

read, num_read = dataset.TokenDataset.__getitem__, 0

def hang_in_the_file_system(self, index):
    global num_read
    num_read += 1
    while num_read == 20 and launch.rank() == 1:
        time.sleep(0.1)
    return read(self, index)

dataset.TokenDataset.__getitem__ = hang_in_the_file_system
launch.run_cli(lambda: train(cli.parse(TrainConfig, FLAGS, None, "", "")) and None)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_stuck_in_its_data_is_named_with_its_place(tokens: Path, tmp_path: Path) -> None:
    script = tmp_path / "stuck.py"
    script.write_text(STUCK)
    _, *arguments = command(tokens, tmp_path / "run", "--distributed_timeout_minutes", "0.1")
    with LaunchedRun([script, *arguments], tmp_path / "run", *TWO) as launched:
        assert launched.wait(90) == 1
    (said,) = errors(launched.output)
    assert re.search(
        r": rank 1 \(process \d+ on .*\) is stuck before step \d+, where it reads", said
    )
    assert "where it reads clips, in " in said
    assert re.search(r"the others have waited for 0\.1 minutes .* in step \d+, in \w+ \(", said)


@pytest.mark.slow
@pytest.mark.distributed
def test_torchrun_restarts_a_run_that_goes_on_by_itself(tokens: Path, tmp_path: Path) -> None:
    whole = make_config(tokens, tmp_path / "whole", max_steps=60, limit_val_batches=1)
    run_distributed(run, 2, whole, timeout_seconds=300)
    argv = command(tokens, tmp_path / "run", max_steps=60)
    options = (*TWO, "--max-restarts=3")
    with LaunchedRun(argv, tmp_path / "run", *options) as launched:
        for steps, rank in ((15, 1), (35, 0)):
            launched.wait_for_steps(steps)
            launched.signal(rank, signal.SIGKILL)
        assert launched.wait(600) == 0, launched.output
    assert launched.output.count("resuming ") == 2
    assert len(losses(tmp_path / "run")) == 60
    for ours, theirs in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
        assert abs(ours - theirs) <= 1e-6 * theirs
