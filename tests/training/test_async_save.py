"""Checkpoints that are written beside the steps: the same files, one at a time, never half."""

from __future__ import annotations

import errno
import json
import os
import signal
import statistics
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR, DistributedTestError, run_distributed
from helpers.run_case import losses, make_config, run

from cosmos_posttrain.checkpoint import torch_dist
from cosmos_posttrain.errors import NonFiniteLossError, SaveError, StoppedError
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.presets import PRESETS
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.metrics import STEP_SECONDS

SAVES = {"max_steps": 6, "save_every_n_steps": 2}


def checkpoints(log_dir: Path) -> list[str]:
    return sorted(path.name for path in (log_dir / "default" / "checkpoints").iterdir())


def written(log_dir: Path) -> dict[str, bytes]:
    """All that checkpoints hold, without what tells the time or the settings."""
    folder = log_dir / "default" / "checkpoints"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("metrics.json", "config.yaml")
    }


def test_the_files_are_the_same_byte_for_byte(tokens: Path, tmp_path: Path) -> None:
    run(make_config(tokens, tmp_path / "sync", **SAVES))
    run(make_config(tokens, tmp_path / "async", async_save=True, **SAVES))
    assert losses(tmp_path / "async") == losses(tmp_path / "sync")
    assert len(checkpoints(tmp_path / "async")) == 3
    assert written(tmp_path / "async") == written(tmp_path / "sync")


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_files_are_the_same_on_two_ranks(tokens: Path, tmp_path: Path, tensor: int) -> None:
    for name in ("sync", "async"):
        config = make_config(tokens, tmp_path / name, async_save=name == "async", **SAVES)
        config.parallel.tensor_model_parallel_size = tensor
        config.save_top_k = 1  # removed by the thread too
        run_distributed(run, 2, config)
    assert losses(tmp_path / "async") == losses(tmp_path / "sync")
    assert checkpoints(tmp_path / "async") == checkpoints(tmp_path / "sync")
    assert written(tmp_path / "async") == written(tmp_path / "sync")


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of a run, which are the process's until the next one."""
    before = torch.get_num_threads()
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.slow
def test_a_save_costs_the_loop_less_than_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    """31.5M parameters, 1,200 tokens a step, 378 MB a checkpoint; -s shows the figures."""
    monkeypatch.syspath_prepend(str(REPOSITORY_DIR / "benchmarks"))
    import bench_train

    model = ModelConfig(
        latent_shape=bench_train.GRID, params_dtype="float32", **bench_train.SIZES["30M"]
    )
    monkeypatch.setitem(PRESETS, "30M", model)
    waits = {}
    for name, num_steps in (("sync", 4), ("async", 12)):
        settings = {"max_steps": num_steps, "save_every_n_steps": 4, "async_save": name == "async"}
        config = make_config(tmp_path / "unused", tmp_path / name, **settings)
        config.model.path, config.global_batch_size = "random:30M", 1
        config.num_threads = num_threads
        for key, value in bench_train.data_settings(tmp_path, model).items():
            setattr(config.data, key.removeprefix("data."), value)
        run(config)
        lines = (tmp_path / name / "default" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        step = statistics.median(row[STEP_SECONDS] for row in rows[1:])  # the first one allocates
        waits[name] = [row["save_wait_seconds"] for row in rows if "save_wait_seconds" in row]
        shown = ", ".join(f"{seconds:.2f}" for seconds in waits[name])
        print(f"{name}, {num_threads} thread(s): waited {shown} s, a step {step:.2f} s")
    assert len(waits["async"]) == 3
    assert max(waits["async"]) < step


class Gate:
    """Holds the threads that write pieces until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.waiting = threading.Event(), threading.Event()
        add_box = torch_dist.TorchDistWriter.add_box

        def wait(writer: Any, *arguments: Any) -> None:
            self.waiting.set()
            assert self.opened.wait(60)
            add_box(writer, *arguments)

        monkeypatch.setattr(torch_dist.TorchDistWriter, "add_box", wait)


def open_trainer(tokens: Path, log_dir: Path, **changes: Any) -> Any:
    from cosmos_posttrain.training.trainer import Trainer

    return Trainer(make_config(tokens, log_dir, async_save=True, **changes))


def test_steps_go_on_while_a_checkpoint_is_written(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run(make_config(tokens, tmp_path / "sync", **SAVES))
    gate = Gate(monkeypatch)
    trainer = open_trainer(tokens, tmp_path / "run", **SAVES)
    train_step, seen = trainer.train_step, []

    def watch(*batches: Any) -> Any:
        row = train_step(*batches)
        seen.append((row["step"], checkpoints(tmp_path / "run")))
        if row["step"] == 3:  # the step of the second save
            gate.opened.set()
        return row

    trainer.train_step = watch
    capsys.readouterr()
    trainer.fit()
    trainer.close()
    assert gate.waiting.is_set()
    # Steps 2 and 3 were made from weights that changed under what was being written.
    assert seen[2:4] == [(2, [".tmp-0-epoch=1-step=1"]), (3, [".tmp-0-epoch=1-step=1"])]
    assert len(checkpoints(tmp_path / "run")) == 3
    assert written(tmp_path / "run") == written(tmp_path / "sync")
    said = capsys.readouterr().out
    assert said.count("saved ") == 3


def test_a_run_that_fails_lets_its_checkpoint_be_written(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    trainer = open_trainer(tokens, tmp_path, **SAVES)
    train_step = trainer.train_step

    def fail(*batches: Any) -> Any:
        row = train_step(*batches)
        if row["step"] == 2:
            threading.Timer(0.2, gate.opened.set).start()
            row["grad_norm"] = float("inf")
        return row

    trainer.train_step = fail
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        trainer.fit()
    assert checkpoints(tmp_path) == [".tmp-0-epoch=1-step=1"]
    trainer.close()
    assert checkpoints(tmp_path) == ["epoch=1-step=1"]


def test_an_interrupted_run_waits_for_its_last_checkpoint(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    trainer = open_trainer(tokens, tmp_path, max_steps=20, save_every_n_steps=10)
    train_step = trainer.train_step

    def interrupt(*batches: Any) -> Any:
        row = train_step(*batches)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.3, gate.opened.set).start()
        return row

    trainer.train_step = interrupt
    try:
        with pytest.raises(StoppedError, match="stopped by SIGTERM after 3 of 20 steps, saved as"):
            trainer.fit()
        assert checkpoints(tmp_path) == ["epoch=1-step=2"]
    finally:
        trainer.close()


def fail_to_write(config: TrainConfig, bad_rank: int) -> str:
    """Trains; on one rank the disk is full when the second checkpoint is written."""
    from cosmos_posttrain import launch
    from cosmos_posttrain.training.trainer import train

    open_file, num_files = torch_dist.TorchDistWriter._open, 0

    def refuse(writer: Any) -> Any:
        nonlocal num_files
        num_files += writer._file is None
        if num_files > 1 and launch.rank() == bad_rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        return open_file(writer)

    torch_dist.TorchDistWriter._open = refuse
    try:
        train(config)
    except SaveError as error:
        return str(error)
    finally:
        torch_dist.TorchDistWriter._open = open_file
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_thread_that_cannot_write_ends_the_run(
    tokens: Path, tmp_path: Path, world_size: int
) -> None:
    config = make_config(tokens, tmp_path, async_save=True, max_steps=40, save_every_n_steps=2)
    messages = run_distributed(fail_to_write, world_size, config, world_size - 1)
    assert all("cannot be written (No space left on device)" in text for text in messages)
    assert world_size == 1 or all(text.startswith("rank 1: ") for text in messages)
    # What was complete stays, and nothing is left of the other.
    assert checkpoints(tmp_path) == ["epoch=1-step=1"]
    assert len(losses(tmp_path)) < 8


def die_while_writing(config: TrainConfig, number: int) -> None:
    """Trains; rank 1 is killed in the middle of the ``number``th checkpoint."""
    from cosmos_posttrain import launch
    from cosmos_posttrain.training.trainer import train

    add_box, num_boxes = torch_dist.TorchDistWriter.add_box, 0
    last: Any = None

    def die(writer: Any, *arguments: Any) -> None:
        nonlocal num_boxes, last, number
        if writer is not last:
            last, number, num_boxes = writer, number - 1, 0
        num_boxes += 1
        if number == 0 and num_boxes == 5 and launch.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        add_box(writer, *arguments)

    torch_dist.TorchDistWriter.add_box = die
    train(config)


@pytest.mark.distributed
def test_a_rank_killed_while_it_writes_costs_only_that_checkpoint(
    tokens: Path, tmp_path: Path
) -> None:
    settings = {"max_steps": 8, "save_every_n_steps": 2, "async_save": True}
    run_distributed(run, 2, make_config(tokens, tmp_path / "whole", **settings))
    config = make_config(tokens, tmp_path / "run", **settings)
    with pytest.raises(DistributedTestError):
        run_distributed(die_while_writing, 2, config, 2)
    assert checkpoints(tmp_path / "run")[-1] == "epoch=1-step=1"
    run_distributed(run, 2, config)
    for ours, theirs in zip(losses(tmp_path / "run"), losses(tmp_path / "whole"), strict=True):
        assert abs(ours - theirs) <= 1e-6 * theirs
    assert written(tmp_path / "run").keys() == written(tmp_path / "whole").keys()
