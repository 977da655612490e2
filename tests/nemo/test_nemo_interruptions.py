"""Runs of ``--engine nemo`` that are interrupted, killed, or meet a full disk."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.distributed_run import REPOSITORY_DIR, kill_tree
from helpers.launched_run import LaunchedRun
from helpers.nemo_case import CLOSE, MAX_STEPS, NEEDS_NEMO, Train, finish, watched, words_of
from helpers.run_case import losses
from helpers.wandb_file import read_launches

from cosmos_posttrain.checkpoint.context import list_checkpoints
from cosmos_posttrain.runlog import read_rows

pytestmark = NEEDS_NEMO


def points(run: Path) -> list[int]:
    """Steps of TensorBoard's curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "default" / "tb_logs"))
    board.Reload()
    return [event.step for event in board.Scalars("reduced_train_loss")]


def test_the_boards_follow_a_run_that_falls_back(
    data: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    """Each step stands there once, also the one whose row was owed when the run was killed."""
    log_dir = tmp_path / "run"
    shutil.copytree(train("nemo", 1), log_dir)
    before = len(read_launches(log_dir / "default"))
    metrics = log_dir / "default" / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    # The older checkpoint has ten steps, of which the last has no row; in the newer one there are
    # as many bytes as there should be, but others.
    metrics.write_text("".join(rows[:9]))
    for path in (list_checkpoints(log_dir)[-1] / "weights").glob("*.distcp"):
        path.write_bytes(b"\xff" * path.stat().st_size)
    finish(words_of(data, "base", log_dir, "nemo", 1))
    assert losses(log_dir) == pytest.approx(losses(train("nemo", 1)), rel=1e-6)
    # TensorBoard had the owed row from the run that is copied here.
    assert points(log_dir) == [*range(10), *range(9, MAX_STEPS)]
    launches = read_launches(log_dir / "default")
    assert len(launches) == before + 1
    assert [row["reduced_train_loss"] for row in launches[-1].history] == losses(log_dir)[9:]


FULL_FOR_TENSORBOARD = f"""
sys.path.insert(0, {str(REPOSITORY_DIR / "tests")!r})
import contextlib
from helpers.full_disk import no_file_beyond
from lightning.pytorch.loggers import TensorBoardLogger

log_metrics = TensorBoardLogger.log_metrics

def log_and_flush(self, metrics, step=None):
    with no_file_beyond(100):
        log_metrics(self, metrics, step)
        with contextlib.suppress(OSError):  # the thread that writes has met it, the next row will
            self.experiment.flush()

TensorBoardLogger.log_metrics = log_and_flush
"""


def test_a_full_disk_ends_the_curves_and_not_the_run(data: dict[str, Path], tmp_path: Path) -> None:
    words = [*words_of(data, "base", tmp_path / "run", "nemo", 1), "--max_steps", 4]
    said = finish(watched(tmp_path / "program", FULL_FOR_TENSORBOARD, words))
    assert said.count("warning: nothing more for TensorBoard in this launch (") == 1, said
    assert len(losses(tmp_path / "run")) == 4
    (launch,) = read_launches(tmp_path / "run" / "default")
    assert len(launch.history) == 4


def test_control_c(data: dict[str, Path], tmp_path: Path) -> None:
    words = [*words_of(data, "base", tmp_path / "run", "nemo", 1), "--max_steps", 100000]
    metrics, output = tmp_path / "run" / "default" / "metrics.jsonl", tmp_path / "output.txt"
    with output.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=REPOSITORY_DIR, stdout=stream, stderr=stream
        )
    try:
        while not metrics.is_file() or len(read_rows(metrics)) < 2:
            assert process.poll() is None, output.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130, output.read_text()
    finally:
        kill_tree(process.pid)
        process.wait()
    assert "Traceback" not in output.read_text()


def kill_within_a_save(words: list[Any], log_dir: Path) -> None:
    """Ends all processes at once, while NeMo's mark says that a checkpoint is being written."""
    checkpoints = log_dir / "default" / "checkpoints"
    with LaunchedRun(words, log_dir, "--standalone", "--nproc_per_node=2") as run:
        while not (list_checkpoints(log_dir) and any(checkpoints.glob("*-unfinished"))):
            assert run.process.poll() is None, run.output
            time.sleep(0.001)
        for process in [*run.workers().values(), run.process]:
            process.kill()
        run.wait(60)


def test_a_kill_while_a_checkpoint_is_written(
    data: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    log_dir = tmp_path / "run"
    words = [*words_of(data, "base", log_dir, "nemo", 2), "--save_every_n_steps", 4]
    kill_within_a_save(words, log_dir)
    (mark,) = (log_dir / "default" / "checkpoints").glob("*-unfinished")
    *_, last = list_checkpoints(log_dir)
    assert mark.name != f"{last.name}-unfinished"
    said = finish(words, 2)
    assert f"resuming {last}" in said
    assert not mark.exists() and len(list_checkpoints(log_dir)) == MAX_STEPS // 4
    assert losses(log_dir) == pytest.approx(losses(train("nemo", 2)), rel=CLOSE)
