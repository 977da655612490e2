"""The parts of a run: checks, schedule, batches, figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.presets import PRESETS, preset
from cosmos_posttrain.training.config import TrainConfig, validate
from cosmos_posttrain.training.flops import flops_per_token
from cosmos_posttrain.training.run_folder import TrainState
from cosmos_posttrain.training.schedule import Schedule

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
