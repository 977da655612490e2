"""What of the NeMo engine needs no NeMo: its sentences, its numbers, its mark on checkpoints."""

from __future__ import annotations

import dataclasses
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR, run_script

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.dist import file_error
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import AxisScale
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.nemo import extra
from cosmos_posttrain.nemo.config import CosmosConfig
from cosmos_posttrain.plan.command import TrainCommand, validate
from cosmos_posttrain.training.fallback import Candidates


@pytest.mark.skipif(extra.is_installed(), reason="NeMo is here")
@pytest.mark.parametrize("script", ["train_general.py", "train_video2world.py"])
def test_a_missing_nemo_is_one_sentence(script: str, tmp_path: Path) -> None:
    words = [str(REPOSITORY_DIR / script), "--engine", "nemo", "--data_path", "tokens"]
    finished = run_script(words, cwd=tmp_path)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: --engine nemo needs NeMo 2, which is not installed here")
    assert "make nemo-env" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("lightning") is not None, reason="Lightning is here")
def test_nemo_toolkit_alone_is_not_enough(tmp_path: Path) -> None:
    """As pip installs it: without Lightning and Fiddle."""
    (tmp_path / "nemo" / "lightning").mkdir(parents=True)
    for folder in ("nemo", "nemo/lightning"):
        (tmp_path / folder / "__init__.py").touch()
    program = """
from cosmos_posttrain.nemo import bases, extra
print(bases.ModelCheckpoint.__module__, extra.is_installed())
extra.check()
"""
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    finished = run_script(["-c", program], cwd=tmp_path, env={"PYTHONPATH": paths})
    assert finished.stdout == "cosmos_posttrain.nemo.bases False\n", finished.stderr
    said = "--engine nemo cannot use the NeMo that is here without lightning and fiddle: run make"
    assert said in finished.stderr.splitlines()[-1]


def test_an_engine_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"^--engine megatron is not one of direct, nemo\.$"):
        validate(TrainCommand(engine="megatron"))


@pytest.mark.parametrize(
    ("key", "value", "flag"),
    [
        ("model.lora_rank", 4, "--lora_rank 4"),
        ("model.num_medusa_heads", 2, "--medusa_num_heads 2"),
        ("optimizer.ema_decay", 0.9, "--ema_decay 0.9"),
        ("async_save", True, "--async_save"),
        ("model.compile", True, "--compile"),
        ("parallel.overlap_param_gather", True, "--overlap_param_gather"),
        ("optimizer.cpu_offload", True, "--optimizer_cpu_offload"),
        ("profile_steps", "1-2", "--profile_steps 1-2"),
        ("samples.every_n_steps", 5, "--sample_every_n_steps 5"),
        ("parallel.virtual_pipeline_model_parallel_size", 2, "--virtual_pipeline_model"),
    ],
)
def test_what_nemo_cannot_do_is_refused(key: str, value: Any, flag: str) -> None:
    for engine in ("direct", "nemo"):
        command = TrainCommand(engine=engine)
        *parents, name = key.split(".")
        holder: Any = command
        for parent in parents:
            holder = getattr(holder, parent)
        setattr(holder, name, value)
        if engine == "direct":
            validate(command)
            continue
        with pytest.raises(ConfigError) as caught:
            validate(command)
        sentence = str(caught.value)
        assert sentence.startswith(flag) and "does not work with --engine nemo" in sentence
        assert sentence.endswith("or use --engine direct.")


def test_the_engine_is_no_part_of_what_a_run_records() -> None:
    command = TrainCommand(engine="nemo")
    assert command.run_config == TrainCommand(engine="direct").run_config


@pytest.mark.parametrize(
    "model",
    [
        preset("tiny"),
        preset("tiny-video2world"),
        dataclasses.replace(preset("12B"), position_scale=AxisScale(1.0, 0.5, 0.5)),
    ],
    ids=["base", "video2world", "yarn"],
)
def test_a_config_says_all_of_a_model(model: Any) -> None:
    groups.initialize(groups.Parallelism())
    changes = {"latent_shape": LatentShape(3, 2, 4), "vocab_size": 72, "params_dtype": "bfloat16"}
    model = dataclasses.replace(model, **changes)
    config = CosmosConfig.of(model, torch.bfloat16, init_seed=7, calculate_per_token_loss=True)
    assert config.model_config == model
    assert (config.init_seed, config.calculate_per_token_loss) == (7, True)
    assert config.params_dtype == torch.bfloat16 and config.bf16


def test_what_the_file_system_said_is_found_behind_other_errors() -> None:
    full = OSError(28, "No space left on device")
    wrapped = RuntimeError("some rank failed")
    wrapped.failures = {1: (full, "its stack")}  # type: ignore[attr-defined]
    wrapped.__context__ = wrapped
    assert file_error(wrapped) == "No space left on device"
    assert file_error(AttributeError("a fault of a program")) is None


def test_the_cpu_device_may_be_entered_twice() -> None:
    with cpu_device(), cpu_device():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"


def test_nemos_mark_means_that_a_checkpoint_is_not_whole(tmp_path: Path) -> None:
    checkpoints = tmp_path / "default" / "checkpoints"
    for step in (4, 9):
        (checkpoints / f"epoch=0-step={step}" / "weights").mkdir(parents=True)
        (checkpoints / f"epoch=0-step={step}" / "context").mkdir()
        write_json(checkpoints / f"epoch=0-step={step}" / "context" / "model.json", {})
    (checkpoints / "epoch=0-step=9-unfinished").touch()
    assert [path.name for path in context.list_checkpoints(tmp_path)] == ["epoch=0-step=4"]
    assert [path.name for path in Candidates(tmp_path)._left] == ["epoch=0-step=4"]
    context.remove_unfinished(checkpoints)
    assert [path.name for path in checkpoints.iterdir()] == ["epoch=0-step=4"]
