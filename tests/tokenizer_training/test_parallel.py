"""Data parallel tokenizer training: two processes do what one does."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.distributed_run import free_port, run_distributed
from helpers.tokenizer_training_case import read_rows, small_config
from safetensors.torch import load_file

from cosmos_posttrain import launch
from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError
from cosmos_posttrain.tokenizer_training import trainer
from cosmos_posttrain.tokenizer_training.config import (
    AdversarialConfig,
    LossConfig,
    TokenizerTrainConfig,
    validate,
)
from cosmos_posttrain.tokenizer_training.objective import Losses, Objective
from cosmos_posttrain.tokenizer_training.parallel import DataParallelRanks
from cosmos_posttrain.tokenizer_training.trainer import train


def parallel_config(videos: Path, output: Path) -> TokenizerTrainConfig:
    """Everything on whose value could depend on how the batch is split."""
    config = small_config(
        videos,
        output,
        batch_size=4,
        image_batch_size=6,
        noise_steps=2,
        validate_every=6,
        save_every=6,
        loss=LossConfig(entropy=0.1, ssim=0.1, flow=0.1),
        adversarial=AdversarialConfig(weight=0.2, start_step=1, channels=4),
    )
    config.data.crop_sizes = [[32, 32], [16, 32]]
    return config


def train_and_say_what_was_printed(config: TokenizerTrainConfig) -> tuple[dict[str, float], str]:
    with (
        contextlib.redirect_stdout(io.StringIO()) as text,
        contextlib.redirect_stderr(text),
    ):
        metrics = train(config)
    return metrics, text.getvalue()


@pytest.mark.distributed
def test_two_processes_train_as_one_does(videos: Path, tmp_path: Path) -> None:
    train(parallel_config(videos, tmp_path / "one"))
    config = parallel_config(videos, tmp_path / "two")
    (metrics, said), (nothing, silence) = run_distributed(
        train_and_say_what_was_printed, 2, config, timeout_seconds=300
    )
    assert not nothing and not silence
    assert "6/6 steps" in said and metrics["validation_psnr"] > 0

    one, two = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        for name in a.keys() - {"loss", "codes_used", "loss_adaptive_weight"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-4), name
        # A latent on the edge between two codes may round to either.
        assert abs(a["codes_used"] - b["codes_used"]) <= 2
    weights = [load_file(tmp_path / n / "model.safetensors") for n in ("one", "two")]
    for name in ("quant_conv.conv3d.weight", "quant_conv.conv3d.bias"):  # what recentring moves
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-5)

    # The split is no part of the run: one process continues what two began.
    config = parallel_config(videos, tmp_path / "two")
    assert train(config)["validation_psnr"] == pytest.approx(metrics["validation_psnr"], abs=1e-5)


def test_batches_that_cannot_be_split_are_refused_before_process_groups_exist(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parallel_config(videos, tmp_path / "run")
    validate(config, 2)
    config.image_batch_size = 5
    expected = (
        r"a batch of 5 images of 32x32 does not divide among 2 processes; change batch_size or "
        r"image_batch_size\.$"
    )
    monkeypatch.setattr(launch, "_group", lambda: None)  # which an earlier test may have made
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(
        DataParallelRanks, "start", lambda *_: pytest.fail("a process group was made")
    )
    with pytest.raises(ConfigError, match=expected):
        train(config)
    assert not (tmp_path / "run").exists()


class BadGradient(Objective):
    """A loss as it should be, whose gradient is not a number on rank 1."""

    def __call__(self, latents: torch.Tensor, *args: Any) -> Losses:
        losses = super().__call__(latents, *args)
        if self.ranks.rank == 0:
            return losses
        return replace(losses, total=losses.total + (0 * latents.sum()).sqrt())


def train_until_it_ends(config: TokenizerTrainConfig, ports: list[int]) -> list[str]:
    """What ends a run: first a signal to rank 1 in its second step, then a gradient of rank 1."""
    said = []
    step = trainer._Trainer.step

    def step_and_signal(self: trainer._Trainer) -> dict[str, Any]:
        if self.completed_steps == 1 and self.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    for name, value in (("_Trainer.step", step_and_signal), ("Objective", BadGradient)):
        os.environ["MASTER_PORT"] = str(ports.pop())
        with mock.patch(f"{trainer.__name__}.{name}", value):
            try:
                train(config)
            except CosmosPosttrainError as error:
                said.append(str(error))
    return said


@pytest.mark.distributed
def test_a_signal_or_a_bad_gradient_in_one_process_ends_all(videos: Path, tmp_path: Path) -> None:
    config = parallel_config(videos, tmp_path / "run")
    ports = [free_port(), free_port()]
    first, second = run_distributed(train_until_it_ends, 2, config, ports, timeout_seconds=300)
    assert "stopped by a signal to another process after 2 of 6 steps" in first[0]
    assert "stopped by SIGTERM after 2 of 6 steps" in second[0]
    assert first[1:] == second[1:]
    assert "the norm of the gradient is nan at step 2; nothing was updated or saved" in first[1]
    # Two steps were saved and logged; one process goes on from them.
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1]
    train(config)
    assert [row["step"] for row in read_rows(tmp_path / "run")] == list(range(6))


def test_one_process_needs_no_group() -> None:
    ranks, rows = DataParallelRanks(), torch.rand(4, 2, requires_grad=True)
    assert ranks.is_first and torch.equal(ranks.share(rows), rows)
    assert ranks.gather_with_gradients(rows) is rows
    assert not ranks.gather(rows).requires_grad
    assert ranks.mean(rows.mean()) == rows.mean()


def entropy_gradient(rows: torch.Tensor) -> torch.Tensor:
    """The gradient that this process's rows get, averaged over processes as DDP does."""
    torch.distributed.init_process_group("gloo")
    ranks = DataParallelRanks.from_environment()
    scale = torch.ones(3, requires_grad=True)
    own = ranks.share(rows) * scale
    everything = ranks.gather_with_gradients(own)
    everything.mean(0).square().sum().backward()
    assert scale.grad is not None
    return ranks.mean(scale.grad)


@pytest.mark.distributed
def test_gathered_rows_give_the_gradient_of_the_whole_batch() -> None:
    rows = torch.arange(12.0).view(4, 3)
    found = run_distributed(entropy_gradient, 2, rows)
    # d/ds of (mean(rows) * s)^2 at s = 1
    expected = 2 * rows.mean(0).square()
    for gradient in found:
        torch.testing.assert_close(gradient, expected)
