"""What happens to a run that is stopped, diverges, or meets another one: nothing is lost."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR, run_distributed, run_script
from helpers.run_case import losses, make_config, run

from cosmos_posttrain.checkpoint.torch_dist import TorchDistReader
from cosmos_posttrain.errors import ConfigError, NonFiniteLossError, OutputFolderError, SaveError


def rows(log_dir: Path) -> list[dict[str, Any]]:
    text = (log_dir / "default" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def checkpoints(log_dir: Path) -> list[str]:
    return sorted(path.name for path in (log_dir / "default" / "checkpoints").iterdir())


@pytest.mark.slow
def test_the_learning_rate_of_the_command_counts_on_resume(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"optimizer__lr_decay_style": "constant", "optimizer__lr_warmup_steps": 0}
    run(make_config(tokens, tmp_path, max_steps=2, **settings))
    changes = settings | {"optimizer__lr": 1e-5, "optimizer__min_lr": 1e-6}
    run(make_config(tokens, tmp_path, max_steps=4, **changes))
    assert "note: --min_lr changes nothing" in capsys.readouterr().out
    assert [row["lr"] for row in rows(tmp_path)] == [1e-3, 1e-3, 1e-5, 1e-5]
    # The end of a decay, too.
    changes |= {"optimizer__lr_decay_style": "linear"}
    run(make_config(tokens, tmp_path, max_steps=200, save_every_n_steps=5, **changes))
    assert rows(tmp_path)[-1]["lr"] < 1.1e-6


def train_with_infinite_gradients(config: Any, step: int, bad_rank: int) -> str:
    """Trains; from a step on, one rank's gradient of one weight is infinite."""
    from cosmos_posttrain.training.trainer import Trainer

    trainer = Trainer(config)

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        is_bad = trainer.completed_steps >= step and torch.distributed.get_rank() == bad_rank
        return gradient * float("inf") if is_bad else None

    trainer.model.decoder.final_layernorm.weight.register_hook(spoil)
    try:
        trainer.fit()
    except NonFiniteLossError as error:
        return str(error)
    finally:
        trainer.close()
    return ""


def assert_finite(checkpoint: Path) -> None:
    reader = TorchDistReader(checkpoint / "weights")
    floats = [key for key in reader.shapes if reader.dtypes[key].is_floating_point]
    assert floats
    for key in floats:
        assert torch.isfinite(reader.read(key)).all(), key


def test_an_infinite_gradient_is_never_applied_or_saved(tokens: Path, tmp_path: Path) -> None:
    config = make_config(tokens, tmp_path, max_steps=10, save_every_n_steps=2)
    message = train_with_infinite_gradients(config, 7, 0)
    assert re.search("the norm of the gradient is (inf|nan) at step 7", message)
    assert checkpoints(tmp_path)[-1].endswith("step=5") and len(checkpoints(tmp_path)) == 3
    assert_finite(next((tmp_path / "default" / "checkpoints").glob("*step=5")))
    assert [row["step"] for row in rows(tmp_path)] == list(range(7))


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_an_infinite_gradient_of_one_rank_stops_all(
    tokens: Path, tmp_path: Path, tensor: int
) -> None:
    config = make_config(tokens, tmp_path, max_steps=4, save_every_n_steps=1)
    config.parallel.tensor_model_parallel_size = tensor
    messages = run_distributed(train_with_infinite_gradients, 2, config, 2, 1)
    assert all("the norm of the gradient" in message for message in messages)
    assert checkpoints(tmp_path)[-1].endswith("step=1")
    for checkpoint in (tmp_path / "default" / "checkpoints").iterdir():
        assert_finite(checkpoint)


def test_a_non_finite_loss_leaves_the_weights_alone(tokens: Path, tmp_path: Path) -> None:
    from cosmos_posttrain.training.callbacks.guard import Guard
    from cosmos_posttrain.training.trainer import Trainer

    trainer = Trainer(make_config(tokens, tmp_path / "run"))
    with torch.no_grad():
        trainer.model.output_layer.weight.fill_(float("nan"))
    before = trainer.model.embedding.word_embeddings.weight.clone()
    row = trainer.train_step(next(trainer.batches()))
    assert trainer.completed_steps == 0
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 0"):
        Guard(trainer.config).after_step(trainer, row)
    # Whatever asks for a checkpoint of such weights gets none.
    with pytest.raises(NonFiniteLossError, match="a weight is not finite"):
        trainer.save(row)
    trainer.close()
    assert torch.equal(before, trainer.model.embedding.word_embeddings.weight)
    assert not checkpoints(tmp_path / "run")


def test_no_validation_batches_mean_no_validation(tokens: Path, tmp_path: Path) -> None:
    run(make_config(tokens, tmp_path, max_steps=2, limit_val_batches=0))
    assert "val_loss" not in rows(tmp_path)[-1]
    with pytest.raises(ConfigError, match="--limit_val_batches -1 must be at least 0"):
        run(make_config(tokens, tmp_path, limit_val_batches=-1))


class LostPowerError(Exception):
    """Stands for anything that ends a process in the middle of a validation."""


def test_steps_are_saved_before_they_are_validated(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the step's row and validation, which were not written, are made good on resume."""
    from cosmos_posttrain.training.validation import Validation

    config = make_config(tokens, tmp_path / "run", max_steps=4, save_every_n_steps=2)
    run(make_config(tokens, tmp_path / "whole", max_steps=4, save_every_n_steps=2))

    def fail(self: Validation) -> dict[str, float]:
        raise LostPowerError

    with monkeypatch.context() as patch, pytest.raises(LostPowerError):
        patch.setattr(Validation, "figures", fail)
        run(config)
    assert checkpoints(tmp_path / "run") == ["epoch=1-step=1"]
    assert [row["step"] for row in rows(tmp_path / "run")] == [0]
    run(config)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    validated = [row.get("val_loss") for row in rows(tmp_path / "run")]
    assert validated == [row.get("val_loss") for row in rows(tmp_path / "whole")]
    assert validated[1] is not None


COMMAND = [
    *("train_general.py", "--model_path", "random:tiny", "--split_string", "3,1,1"),
    *("--tensor_model_parallel_size", "1", "--global_batch_size", "4", "--num_threads", "1"),
    *("--lr", "1e-3", "--max_steps", "60", "--save_every_n_steps", "50"),
]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("nproc", "name"),
    # torchrun passes SIGUSR1 on only where it is told to.
    [
        (1, "SIGTERM"),
        pytest.param(1, "SIGUSR1", marks=pytest.mark.slow),
        pytest.param(2, "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_ends_the_run(
    tokens: Path, tmp_path: Path, nproc: int, name: str
) -> None:
    log_dir = tmp_path / "run"
    arguments = [*COMMAND, "--data_path", str(tokens), "--log_dir", str(log_dir)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *(launcher if nproc > 1 else []), *arguments]
    process = subprocess.Popen(
        command, cwd=REPOSITORY_DIR, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    metrics = log_dir / "default" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.Signals[name])
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    if nproc == 1:
        assert process.returncode == 1
        assert f"stopped by {name}" in stderr.splitlines()[-1]
    (saved,) = checkpoints(log_dir)
    done = int(saved.partition("step=")[2]) + 1
    assert 5 <= done < 60 and len(rows(log_dir)) == done
    assert not (log_dir / ".lock").exists()
    finished = run_script(arguments, nproc)
    assert finished.returncode == 0, finished.stderr
    whole = tmp_path / "whole"
    if nproc == 1:
        run(make_config(tokens, whole, max_steps=60, save_every_n_steps=50))
    else:
        arguments[-1] = str(whole)
        assert run_script(arguments, nproc).returncode == 0
    for ours, theirs in zip(losses(log_dir), losses(whole), strict=True):
        assert abs(ours - theirs) <= 1e-6 * theirs


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(tokens: Path, tmp_path: Path) -> None:
    from cosmos_posttrain.training.trainer import Trainer

    trainer = Trainer(make_config(tokens, tmp_path / "run"))
    try:
        arguments = [*COMMAND, "--data_path", str(tokens), "--log_dir", str(tmp_path / "run")]
        second = run_script(arguments)
        assert second.returncode == 2
        assert second.stderr.count("\n") == 1
        assert "is being written by another process" in second.stderr
    finally:
        trainer.close()
    run(make_config(tokens, tmp_path / "run", max_steps=1))


def test_a_disk_that_cannot_hold_a_checkpoint(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the first step; and later nothing is lost but the steps since the last one."""
    usage = shutil.disk_usage

    def nearly_full(path: str) -> Any:
        return SimpleNamespace(total=usage(path).total, used=usage(path).used, free=1000)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", nearly_full)
        with pytest.raises(OutputFolderError, match=r"only 0\.000 GB are free"):
            run(make_config(tokens, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    from cosmos_posttrain.training.trainer import Trainer

    trainer = Trainer(make_config(tokens, tmp_path / "run", max_steps=4, save_every_n_steps=2))
    original = trainer.train_step

    def fill_the_disk(*batches: Any) -> Any:
        if trainer.completed_steps == 2:
            monkeypatch.setattr(shutil, "disk_usage", nearly_full)
        return original(*batches)

    monkeypatch.setattr(trainer, "train_step", fill_the_disk)
    with pytest.raises(SaveError, match="no checkpoint was written"):
        trainer.fit()
    trainer.close()
    assert [name.partition("step=")[2] for name in checkpoints(tmp_path / "run")] == ["1"]
