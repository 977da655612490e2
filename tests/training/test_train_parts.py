"""The parts of a run: checks, schedule, batches, figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.config import merge, to_yaml
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.presets import PRESETS, preset
from cosmos_posttrain.training.config import TrainConfig, validate
from cosmos_posttrain.training.flops import flops_per_token, peak_flops
from cosmos_posttrain.training.metrics import StepMeter
from cosmos_posttrain.training.run_folder import TrainState
from cosmos_posttrain.training.schedule import Schedule
from cosmos_posttrain.training.trainer import train

pytestmark = pytest.mark.compat

REPOSITORY = Path(__file__).resolve().parents[2]


def test_validate_lists_every_problem_at_once() -> None:
    config = TrainConfig(max_steps=0)
    config.optimizer.lr = -1.0
    with pytest.raises(ConfigError) as error:
        validate(config, world_size=1)
    for part in ("--data_path is missing", "--max_steps 0", "--lr -1.0"):
        assert part in str(error.value)


def test_batch_must_divide_over_ranks() -> None:
    config = TrainConfig(global_batch_size=6, micro_batch_size=2)
    config.data.path = "x"
    config.parallel.tensor_model_parallel_size = 1
    validate(config, world_size=3)
    with pytest.raises(ConfigError, match="use a multiple of 4"):
        validate(config, world_size=2)


def test_a_wrong_number_of_processes_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    """Not after tens of gigabytes of a model have been downloaded."""
    config = TrainConfig(global_batch_size=8, log_dir=str(tmp_path / "run"))
    config.data.path, config.model.path = str(tmp_path / "no data"), "nobody/nothing"
    config.parallel.tensor_model_parallel_size = 2
    for processes, words in ((1, "but there is 1;"), (3, "but there are 3;")):
        with pytest.raises(ConfigError) as error:
            validate(config, processes)
        said = str(error.value)
        assert "2 x 1 x 1 needs a multiple of 2 processes" in said and words in said
        assert "torchrun --nproc-per-node=2" in said and "global_batch_size" not in said
    validate(config, world_size=4)
    with pytest.raises(ConfigError, match="needs a multiple of 2 processes"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"samples.num_clips": 3}, "--num_sample_clips has no effect without --sample_every"),
        ({"optimizer.lr_wsd_decay_style": "cosine"}, "--lr_wsd_decay_style cosine has no effect"),
        ({"model.medusa_freeze_backbone": False}, "has no effect without --medusa_num_heads"),
        (
            {"model.num_medusa_heads": 2, "optimizer.freeze_body_steps": 5},
            "--freeze_body_steps 5 trains nothing at all with a frozen backbone",
        ),
        (
            {"model.num_medusa_heads": 2, "optimizer.embedding_lr": 1e-4},
            r"--embedding_lr 0\.0001 has no effect with a frozen backbone",
        ),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], sentence: str) -> None:
    """From YAML as from flags."""
    base = {"data.path": "x", "parallel.tensor_model_parallel_size": 1}
    with pytest.raises(ConfigError, match=sentence):
        validate(merge(TrainConfig, None, list((base | settings).items())), world_size=1)


def test_a_recorded_config_is_accepted_again(tmp_path: Path) -> None:
    """It holds every setting, those without effect too, at their defaults."""
    config = TrainConfig()
    config.data.path, config.parallel.tensor_model_parallel_size = "x", 1
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    again = merge(TrainConfig, tmp_path / "config.yaml")
    assert again == config and "lr_wsd_decay_style: minus_sqrt" in to_yaml(config)
    validate(again, world_size=1)


def test_an_interleaved_pipeline_needs_stages_layers_and_batches() -> None:
    config = TrainConfig(global_batch_size=8)
    config.data.path = "x"
    parallel = config.parallel
    parallel.tensor_model_parallel_size, parallel.virtual_pipeline_model_parallel_size = 1, 2
    with pytest.raises(ConfigError, match="needs --pipeline_model_parallel_size above 1"):
        validate(config, world_size=1)
    parallel.pipeline_model_parallel_size = 4
    validate(config, world_size=8)
    with pytest.raises(ConfigError, match=r"takes 4 micro-batches at a time: .* a multiple of 16"):
        validate(config, world_size=16)
    config.model.num_medusa_heads, config.model.medusa_freeze_backbone = 2, False
    with pytest.raises(ConfigError, match="needs --virtual_pipeline_model_parallel_size 1"):
        validate(config, world_size=8)
    with pytest.raises(ConfigError, match="size 3 does not divide the 4 layers of each of 4 pi"):
        preset("4B").check_pipeline_parallel(4, 3)


class ParameterGroups:
    """What a schedule needs of an optimizer."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0, "params": []}]


def schedule_of(steps: int, **changes: object) -> list[float]:
    config = TrainConfig(max_steps=steps)
    for key, value in changes.items():
        setattr(config.optimizer, key, value)
    optimizer = ParameterGroups()
    schedule = Schedule(config, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        schedule.step(increment=1)
    return rates


def test_schedule_warms_up_and_decays() -> None:
    rates = schedule_of(100, lr=1.0, min_lr=0.1, lr_warmup_steps=9)
    assert rates[0] == pytest.approx(0.1)  # never a step without learning
    assert rates[9] == pytest.approx(1.0)
    assert rates == [*sorted(rates[:10]), *sorted(rates[10:], reverse=True)]
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    # Half-way through the decay a cosine is half-way down.
    assert rates[55] == pytest.approx(0.55, abs=0.02)


def test_constant_schedule_stays() -> None:
    assert set(schedule_of(5, lr=0.5, lr_decay_style="constant", lr_warmup_steps=0)) == {0.5}


def test_checkpoint_names_count_as_documented() -> None:
    assert context.checkpoint_name(0, 25) == "epoch=0-step=24"
    assert TrainState(25, 50).epoch(num_clips=50) == 0
    assert TrainState(26, 51).epoch(num_clips=50) == 1


def test_flops_of_the_published_sizes() -> None:
    # 6 N D dominates: 4B without its input embedding is 3.75e9 parameters; attention adds a tenth.
    assert flops_per_token(PRESETS["4B"]) == pytest.approx(6 * 3.75e9 * 1.22, rel=0.03)


def test_flops_of_a_text_model() -> None:
    """Against the base model: cross-attention, its text projected once per clip; no more rows."""
    model, base = PRESETS["5B-Video2World"], PRESETS["4B"]
    hidden, queries, keys = 4096, 4096, 1024
    matrices = 2 * hidden * queries + 2 * 128 + hidden
    text = 2 * 1024 * keys * 512 / model.seq_length
    scores = 12 * 512 * queries + 6 * queries * (model.seq_length - base.seq_length)
    added = flops_per_token(model) - flops_per_token(base)
    assert added == pytest.approx(16 * (6 * (matrices + text) + scores), rel=1e-9)


def test_flops_need_no_torch() -> None:
    """A plan starts in a second."""
    code = "import sys, cosmos_posttrain.training.flops as f; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, timeout=60)


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_is_that_of_the_card(
    device: str, tflops: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card for PCI Express reaches less than what its name shares with the module's."""
    assert peak_flops(device) == (None if tflops is None else tflops * 1e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    row = StepMeter(None, preset("4B"), num_clips=4, num_tokens=12800).speed(2.0, 0.0)
    assert row["TFLOPS_per_GPU"] is not None
    mfu = None if tflops is None else pytest.approx(row["TFLOPS_per_GPU"] / tflops)
    assert row["mfu"] == mfu


def test_the_flops_of_a_gpu_are_its_share_of_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 clips in 5 + 3 seconds on 8 processes; waiting for the batch counts."""
    monkeypatch.setattr(launch, "_group", lambda: None)  # which an earlier test may have made
    monkeypatch.setenv("WORLD_SIZE", "8")
    model = preset("4B")
    row = StepMeter(None, model, num_clips=4, num_tokens=12800).speed(5.0, 3.0)
    assert row["tokens_per_second"] == 6400 and row["tokens_per_second_per_gpu"] == 800
    assert row["clips_per_second_per_gpu"] == pytest.approx(1 / 16)
    assert row["TFLOPS_per_GPU"] == pytest.approx(800 * flops_per_token(model) / 1e12)
    assert row["mfu"] is None
