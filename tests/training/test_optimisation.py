"""What the optimizer does with each weight: rates, decay, frozen steps, the average."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training_state
from helpers.distributed_run import run_distributed
from helpers.run_case import losses, make_config, run

from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.checkpoint.torch_dist import TorchDistReader
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import CheckpointError, ConfigError
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.training.config import TrainConfig, validate
from cosmos_posttrain.training.schedule import BODY, Schedule
from cosmos_posttrain.training.trainer import Trainer

ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


class Groups:
    """What a schedule needs of an optimizer: the body's group, and the rows'."""

    def __init__(self, row_lr: float | None = None) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0, BODY: True}]
        if row_lr is not None:
            rows = {"max_lr": row_lr, "min_lr": row_lr / 10, BODY: False}
            self.param_groups.append({"lr": 0.0, "weight_decay": 0.0, **rows})


def rates(steps: int, row_lr: float | None = None, **changes: Any) -> list[list[float]]:
    """Each group's rate at each step; compared with what metrics.jsonl records of it."""
    config = TrainConfig(max_steps=steps)
    config.optimizer = dataclasses.replace(config.optimizer, embedding_lr=row_lr, **changes)
    optimizer = Groups(row_lr)
    schedule = Schedule(config, optimizer)
    found = []
    for _ in range(steps):
        found.append([float(group["lr"]) for group in optimizer.param_groups])
        assert list(schedule.rates().values()) == pytest.approx(found[-1], rel=1e-12)
        schedule.step(increment=1)
    return found


def test_wsd_is_constant_until_its_decay() -> None:
    settings: dict[str, Any] = {"lr": 1.0, "min_lr": 0.1, "lr_warmup_steps": 10}
    settings["lr_decay_style"] = "wsd"
    for style, half_way in (("linear", 0.55), ("cosine", 0.55), ("minus_sqrt", 0.3636)):
        curve = [
            r[0] for r in rates(100, **settings, lr_wsd_decay_steps=20, lr_wsd_decay_style=style)
        ]
        assert curve[:10] == sorted(curve[:10]) and curve[0] > 0
        assert set(curve[10:81]) == {1.0}
        assert curve[80:] == sorted(curve[80:], reverse=True) and curve[81] < 1
        assert curve[90] == pytest.approx(half_way, abs=0.001)
        assert 0.1 < curve[99] < 0.16
    # The constant part does not depend on where the run ends: a longer run has the same.
    assert [r[0] for r in rates(200, **settings)][:90] == [r[0] for r in rates(100, **settings)][
        :90
    ]


def test_rows_have_a_rate_of_their_own_of_the_same_shape() -> None:
    curve = rates(50, row_lr=4.0, lr=1.0, min_lr=0.1)
    assert [row / body for body, row in curve] == pytest.approx([4.0] * 50)


def test_a_frozen_body_has_no_rate() -> None:
    curve = rates(20, row_lr=1.0, lr=1.0, freeze_body_steps=5)
    free = rates(20, row_lr=1.0, lr=1.0)
    assert [body for body, _ in curve[:5]] == [0.0] * 5
    assert curve[5:] == free[5:]
    assert [row for _, row in curve] == [row for _, row in free]


def test_settings_that_contradict_each_other_are_refused() -> None:
    for changes, sentence in (
        ({"lr_wsd_decay_steps": 5}, "has no effect with --lr_decay_style cosine: give wsd"),
        (
            {"lr_wsd_decay_steps": 90, "lr_decay_style": "wsd", "lr_warmup_steps": 20},
            "together must be at most --max_steps 100",
        ),
        # Where no warm-up is given, there is one all the same: 5 of 100 steps.
        (
            {"lr_wsd_decay_steps": 100, "lr_decay_style": "wsd"},
            "--lr_wsd_decay_steps 100 and --lr_warmup_steps 5 together must be at most",
        ),
        (
            {"lr_warmup_steps": 95, "lr_decay_style": "wsd"},
            "--lr_wsd_decay_steps 10 and --lr_warmup_steps 95 together must be at most",
        ),
        ({"lr_wsd_decay_style": "linear"}, "--lr_wsd_decay_style linear has no effect with"),
        ({"embedding_lr": 0.0}, "--embedding_lr 0.0 must be above 0"),
        ({"ema_decay": 1.0}, "--ema_decay 1.0"),
    ):
        config = TrainConfig()
        config.data.path, config.parallel.tensor_model_parallel_size = "x", 1
        config.optimizer = dataclasses.replace(config.optimizer, **changes)
        with pytest.raises(ConfigError, match=sentence):
            validate(config, world_size=1)


@pytest.mark.parametrize("max_steps", [1, 2, 19, 20, 100])
def test_the_longest_decay_of_wsd_falls_evenly(max_steps: int) -> None:
    """Behind the default warm-up; what the checks let through makes no jump."""
    config = TrainConfig(max_steps=max_steps)
    config.data.path, config.parallel.tensor_model_parallel_size = "x", 1
    settings: dict[str, Any] = {"lr": 1.0, "min_lr": 0.0, "lr_decay_style": "wsd"}
    settings["lr_wsd_decay_style"] = "linear"
    config.optimizer = dataclasses.replace(config.optimizer, **settings)
    validate(config, world_size=1)
    decay = max_steps - max_steps // 20
    config.optimizer.lr_wsd_decay_steps = decay
    validate(config, world_size=1)
    curve = [row[0] for row in rates(max_steps, **settings, lr_wsd_decay_steps=decay)]
    falls = [now - later for now, later in itertools.pairwise(curve)]
    assert max(falls, default=0.0) <= 1.0 / decay + 1e-9
    config.optimizer.lr_wsd_decay_steps = decay + 1
    with pytest.raises(ConfigError, match="together must be at most"):
        validate(config, world_size=1)


def test_matrices_decay_and_norms_do_not() -> None:
    """One step on gradients of zero: what is left of each weight is its decay."""
    state = training_state.build(preset("tiny", 64))
    config = TrainConfig()
    config.optimizer.lr_warmup_steps = 0
    Schedule(config, state.optimizer.optimizer)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    with cpu_device():
        state.ddp.zero_grad_buffer()
        state.ddp.finish_grad_sync()
        state.optimizer.optimizer.step()
    kept = 1 - config.optimizer.lr * config.optimizer.weight_decay
    for name, parameter in state.model.named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, before[name]), name
        else:
            assert torch.allclose(parameter, kept * before[name], rtol=1e-6, atol=0), name
            assert not torch.equal(parameter, before[name]), name


def _weights(log_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Whole weights of a checkpoint, stacked as on disk, without their prefix."""
    reader = TorchDistReader(_checkpoint(log_dir, step) / "weights")
    names = [key for key in reader.shapes if key.startswith("module.")]
    return {name.removeprefix("module."): reader.read(name) for name in names}


def _checkpoint(log_dir: Path, step: int) -> Path:
    return next((log_dir / "default" / "checkpoints").glob(f"*step={step}"))


def _rows_of_metrics(log_dir: Path) -> list[dict[str, Any]]:
    lines = (log_dir / "default" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_first_step_is_as_long_as_the_rates_say(tokens: Path, tmp_path: Path) -> None:
    changes = {"optimizer__embedding_lr": 1e-2, "optimizer__lr_warmup_steps": 0}
    changes |= {"optimizer__weight_decay": 0.0, "save_every_n_steps": 1}
    run(make_config(tokens, tmp_path, max_steps=2, **changes))
    first, second = _weights(tmp_path, 0), _weights(tmp_path, 1)
    for name, weight in first.items():
        # Adam's steps are about as long as the rate, whatever the gradient.
        longest = float((second[name] - weight).abs().max())
        wanted = 1e-2 if name in ROWS else 1e-3
        assert 0.2 * wanted < longest < 2 * wanted, name
    row = _rows_of_metrics(tmp_path)[0]
    assert (row["lr"], row["embedding_lr"]) == pytest.approx((1e-3, 1e-2))


@pytest.mark.distributed
def test_the_body_waits_for_the_rows(tokens: Path, tmp_path: Path) -> None:
    changes = {"optimizer__freeze_body_steps": 3, "max_steps": 6, "save_every_n_steps": 1}
    run(make_config(tokens, tmp_path / "whole", **changes))
    checkpoints = [_weights(tmp_path / "whole", step) for step in range(6)]
    for before, after, is_free in zip(checkpoints, checkpoints[1:], (0, 0, 1, 1, 1), strict=False):
        for name, weight in before.items():
            assert torch.equal(weight, after[name]) != (name in ROWS or bool(is_free)), name
    rows = _rows_of_metrics(tmp_path / "whole")
    assert [row["lr"] == 0 for row in rows] == [True] * 3 + [False] * 3
    # What is frozen is no part of the norm, and of no clipping.
    assert rows[2]["grad_norm"] < rows[3]["grad_norm"]
    # Killed in the frozen steps and behind them, the run goes on as if nothing had happened.
    for last in (1, 3):
        log_dir = tmp_path / f"after{last}"
        shutil.copytree(tmp_path / "whole", log_dir)
        for step in range(last + 1, 6):
            shutil.rmtree(_checkpoint(log_dir, step))
        run(make_config(tokens, log_dir, **changes))
        assert losses(log_dir) == losses(tmp_path / "whole")
    split = make_config(
        tokens, tmp_path / "split", **changes, parallel__tensor_model_parallel_size=2
    )
    run_distributed(run, 2, split)
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


EMA = {"optimizer__ema_decay": 0.75, "max_steps": 4, "save_every_n_steps": 1}


def _export(log_dir: Path, target: Path) -> dict[str, torch.Tensor]:
    source, folder = str(_checkpoint(log_dir, 3)), str(target)
    convert(CheckpointConversionConfig(source, folder, "pt", weights="ema", verify=True))
    return dict(open_source(target).open_weights().all_megatron())


@pytest.mark.distributed
def test_the_average_is_kept_resumed_and_exported(tokens: Path, tmp_path: Path) -> None:
    run(make_config(tokens, tmp_path / "whole", **EMA))
    exported = _export(tmp_path / "whole", tmp_path / "exported")
    # The same from the checkpoints of all steps; the run began with its fresh weights.
    name = "output_layer.weight"
    config = make_config(tokens, tmp_path / "start", max_steps=1, optimizer__lr=1e-30)
    config.optimizer.weight_decay = 0.0
    run(config)
    average = _weights(tmp_path / "start", 0)[name]
    for step in range(4):
        average = 0.75 * average + 0.25 * _weights(tmp_path / "whole", step)[name]
    assert torch.allclose(exported[name], average, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(exported[name], _weights(tmp_path / "whole", 3)[name], rtol=1e-3)
    # Resumed, also at another layout; and the run itself does not feel it.
    for layout, size in (("one", 1), ("DP2", 2), ("TP2", 2)):
        log_dir = tmp_path / layout
        shutil.copytree(tmp_path / "whole", log_dir)
        for step in (2, 3):
            shutil.rmtree(_checkpoint(log_dir, step))
        config = make_config(tokens, log_dir, **EMA)
        config.parallel.tensor_model_parallel_size = 2 if layout == "TP2" else 1
        run_distributed(run, size, config)
        again = _export(log_dir, tmp_path / f"{layout} exported")
        for key, value in exported.items():
            # Sums in another order where two ranks share the work.
            tolerance = 0.0 if layout == "one" else 1e-5
            assert float((again[key] - value).abs().max()) <= tolerance, (layout, key)
    run(make_config(tokens, tmp_path / "plain", max_steps=4))
    assert losses(tmp_path / "plain") == losses(tmp_path / "whole")


def test_an_average_can_begin_in_mid_run_and_be_missed(tokens: Path, tmp_path: Path) -> None:
    """In bfloat16: it is made of the float32 master weights."""
    settings: dict[str, Any] = {"model__dtype": "bfloat16", "save_every_n_steps": 2}
    run(make_config(tokens, tmp_path, max_steps=2, **settings))
    checkpoint = str(_checkpoint(tmp_path, 1))
    with pytest.raises(CheckpointError, match="keeps no average of the weights; train with --ema"):
        convert(CheckpointConversionConfig(checkpoint, str(tmp_path / "x"), "pt", weights="ema"))
    master = "optimizer.state.param.module.output_layer.weight"
    before = TorchDistReader(_checkpoint(tmp_path, 1) / "weights").read(master)
    settings |= {"max_steps": 3, "optimizer__ema_decay": 0.5}
    run(make_config(tokens, tmp_path, **settings))
    after = TorchDistReader(_checkpoint(tmp_path, 2) / "weights")
    key = "optimizer.state.ema.module.output_layer.weight"
    assert after.dtypes[key] == torch.float32
    assert torch.allclose(after.read(key), (before + after.read(master)) / 2, rtol=1e-6, atol=1e-9)
    with pytest.raises(CheckpointError, match="no checkpoint of a training run"):
        convert(CheckpointConversionConfig(str(tmp_path), str(tmp_path / "pt"), "pt"))
        settings = {"target_format": "safetensors", "weights": "ema"}
        convert(CheckpointConversionConfig(str(tmp_path / "pt"), str(tmp_path / "y"), **settings))


@pytest.mark.distributed
def test_the_z_loss_is_minimised_and_not_reported(tokens: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 10, "optimizer__lr": 1e-2}
    run(make_config(tokens, tmp_path / "without", **changes))
    changes["z_loss_coefficient"] = 0.1
    run(make_config(tokens, tmp_path / "with", **changes))
    before, after = losses(tmp_path / "without"), losses(tmp_path / "with")
    assert before[0] == after[0] and before[1] != after[1]
    sums = [_mean_square_log_sum(tmp_path / name) for name in ("without", "with")]
    assert sums[1] < 0.5 * sums[0]
    split = make_config(tokens, tmp_path / "TP2", **changes, parallel__tensor_model_parallel_size=2)
    run_distributed(run, 2, split)
    # At this rate 1e-5 was measured.
    assert losses(tmp_path / "TP2") == pytest.approx(after, rel=1e-4)


def _mean_square_log_sum(log_dir: Path) -> float:
    tokens = torch.randint(64, (4, 18), generator=torch.Generator().manual_seed(0))
    return float(load_model(log_dir).logits(tokens).logsumexp(-1).square().mean())


def test_no_loss_on_given_latents_of_a_base_model(tokens: Path, tmp_path: Path) -> None:
    """The loss is the mean over the tokens of the other latent frames."""
    config = make_config(tokens, tmp_path, max_steps=1, num_condition_latents=2)
    config.optimizer.lr, config.optimizer.weight_decay = 1e-30, 0.0
    with contextlib.closing(Trainer(config)) as trainer:
        batches = next(trainer.batches())
        trainer.fit()
    clips = torch.cat([batch.tokens for batch in batches])
    labels = clips.roll(-1, dims=1)
    logits = load_model(tmp_path).logits(clips)
    each = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    given = 2 * 2 * 3  # of 3x2x3 tokens; the last position predicts nothing
    assert losses(tmp_path) == pytest.approx([float(each[:, given - 1 : -1].mean())], rel=1e-5)
    assert losses(tmp_path) != pytest.approx([float(each[:, :-1].mean())], rel=1e-3)
