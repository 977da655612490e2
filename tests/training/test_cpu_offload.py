"""The optimizer in host memory: the numbers of the one on the device, bit by bit."""

from __future__ import annotations

import dataclasses
import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training_state
from helpers.distributed_run import run_distributed
from helpers.run_case import losses, make_config, run
from helpers.training_state import TrainingState
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from cosmos_posttrain.checkpoint import dist
from cosmos_posttrain.checkpoint.torch_dist import TorchDistReader
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.training import offload
from cosmos_posttrain.training import optimizer as optimizers
from cosmos_posttrain.training.config import TrainConfig, validate
from cosmos_posttrain.training.norms import gradient_norms, parameter_norm

TINY = preset("tiny", vocab_size=100)
OFFLOAD = {"optimizer__cpu_offload": True}
# All that reads or writes weights, moments or gradients on its own way.
BUSY = {
    "optimizer__ema_decay": 0.75,
    "optimizer__embedding_lr": 1e-2,
    "optimizer__freeze_body_steps": 3,
    "optimizer__clip_grad": 0.5,
    "limit_val_batches": 0,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP": {},
    "DP, gathered late": {"parallel__overlap_param_gather": True},
    "TP": {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True},
    "PP": {"parallel__pipeline_model_parallel_size": 2},
    "PP, interleaved": {
        "parallel__pipeline_model_parallel_size": 2,
        "parallel__virtual_pipeline_model_parallel_size": 2,
    },
}


def _on_disk(log_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    folder = next((log_dir / "default" / "checkpoints").glob(f"*step={step}"))
    reader = TorchDistReader(folder / "weights")
    return {key: reader.read(key) for key in reader.shapes}


def _assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def _norms(log_dir: Path) -> list[str]:
    lines = (log_dir / "default" / "metrics.jsonl").read_text().splitlines()
    return [line.partition('"grad_norm"')[2].partition("data_wait")[0] for line in lines]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_with_and_without_a_run_is_the_same(tokens: Path, tmp_path: Path, dtype: str) -> None:
    """Curve, norms and checkpoints; half way it is resumed with the other's setting."""
    steps = {"float32": 20, "bfloat16": 6}[dtype]
    changes: dict[str, Any] = {"model__dtype": dtype, "max_steps": steps, **BUSY}
    changes["save_every_n_steps"] = steps // 2
    other = {**OFFLOAD, "async_save": True}
    if dtype == "bfloat16":
        changes["optimizer__grad_reduce_in_bf16"] = True
        other["optimizer__offload_fraction"] = 0.5
    plain, offloaded = tmp_path / "plain", tmp_path / "offloaded"
    run(make_config(tokens, plain, **changes))
    run(make_config(tokens, offloaded, **changes, **other))
    assert losses(offloaded) == losses(plain)
    assert _norms(offloaded) == _norms(plain) and "param_norm" in _norms(plain)[0]
    for step in (steps // 2 - 1, steps - 1):
        _assert_equal(_on_disk(offloaded, step), _on_disk(plain, step))
    for log_dir, settings in ((plain, other), (offloaded, {})):
        again = tmp_path / f"from {log_dir.name}"
        shutil.copytree(log_dir, again)
        shutil.rmtree(next((again / "default" / "checkpoints").glob(f"*step={steps - 1}")))
        run(make_config(tokens, again, **changes, **settings))
        assert losses(again) == losses(plain)
        _assert_equal(_on_disk(again, steps - 1), _on_disk(plain, steps - 1))


def test_a_new_run_begins_with_the_weights_that_it_was_given(tokens: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"max_steps": 1, "limit_val_batches": 0}
    run(make_config(tokens, tmp_path / "start", **changes))
    changes["model__path"] = str(tmp_path / "start")
    run(make_config(tokens, tmp_path / "plain", **changes))
    run(make_config(tokens, tmp_path / "offloaded", **changes, **OFFLOAD))
    _assert_equal(_on_disk(tmp_path / "offloaded", 0), _on_disk(tmp_path / "plain", 0))


def _config(is_offloaded: bool, **changes: Any) -> TrainConfig:
    config = TrainConfig()
    changes["cpu_offload"] = is_offloaded
    config.optimizer = dataclasses.replace(config.optimizer, **changes)
    return config


def _step(state: TrainingState, seed: int, scale: float = 1.0) -> float:
    """The trainer's, on random gradients; returns their norm."""
    generator = torch.Generator().manual_seed(seed + 1000 * torch.distributed.get_rank())
    optimizer = state.optimizer.optimizer
    with cpu_device():
        state.ddp.zero_grad_buffer()
        for parameter in state.model.parameters():
            parameter.main_grad.normal_(generator=generator).mul_(scale)
        state.ddp.finish_grad_sync()
    norm = float(gradient_norms(optimizer)[0])
    if norm < float("inf"):
        optimizers.apply_gradients(optimizer, norm)
    return norm


def _inner(state: TrainingState) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
    """Parameters as the optimizer was given them, what is updated instead, and its state."""
    for part in optimizers.parts_of(state.optimizer.optimizer):
        for inner in offload.inner_optimizers(part.optimizer):
            for main, values in inner.state.items():
                yield offload.parameter_of(part.optimizer, main), main, values


def _num_in_memory() -> int:
    return sum(type(item) is HybridDeviceOptimizer for item in gc.get_objects())


@pytest.mark.compat
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_what_lies_in_host_memory(dtype: torch.dtype, fraction: float | None) -> None:
    gc.collect()
    before = _num_in_memory()
    state = training_state.build(TINY, dtype, config=_config(True, offload_fraction=fraction))
    assert _num_in_memory() == before + 1  # Megatron makes another one of the undivided weights
    plain = training_state.build(TINY, dtype, config=_config(False))
    for seed, scale in ((1, 1.0), (2, float("inf")), (3, 1e-5)):  # clipped, left out, not clipped
        norms = [_step(each, seed, scale) for each in (state, plain)]
        assert norms[0] == norms[1] or scale > 1
    _assert_equal(state.tensors(), plain.tensors())
    norms = [float(parameter_norm(each.optimizer.optimizer)) for each in (state, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    on_host = sum(main.numel() for _, main, _ in _inner(state) if hasattr(main, "is_on_host"))
    whole = sum(parameter.numel() for parameter in state.model.parameters())
    # Whole matrices are moved until the share is reached.
    largest = max(parameter.numel() for parameter in state.model.parameters())
    wanted = whole * (fraction or 1.0)
    assert wanted <= on_host < wanted + largest and on_host <= whole
    for parameter, main, values in _inner(state):
        assert values["exp_avg"].dtype == main.dtype == torch.float32
        is_copy = main.data_ptr() != parameter.data_ptr()
        assert is_copy == (hasattr(main, "is_on_host") or dtype == torch.bfloat16)
        # On the host a gradient's memory is kept; on the GPU nothing is, between two steps.
        assert (main.grad is not None) == hasattr(main, "is_on_host")
        assert parameter.grad is None or parameter is main


def on_two_ranks(tmp_path: Path) -> None:
    """The state divided over data-parallel ranks: steps, a checkpoint, and steps behind it."""
    for dtype in (torch.float32, torch.bfloat16):
        states = [training_state.build(TINY, dtype, config=_config(flag)) for flag in (True, False)]
        for state in states:
            assert _step(state, 1) > 1
        _assert_equal(states[0].tensors(), states[1].tensors())
        folder = tmp_path / str(dtype)
        folder.mkdir(exist_ok=True)
        torch.distributed.barrier()
        dist.save(folder, states[0].model, states[0].optimizer)
        again = training_state.build(TINY, dtype, seed=2, config=_config(True))
        dist.load(folder, again.model, again.optimizer)
        assert {group["step"] for group in again.optimizer.param_groups()} == {1}
        _assert_equal(again.tensors(), states[1].tensors())
        for state in (again, states[1]):
            _step(state, 2)
        _assert_equal(again.tensors(), states[1].tensors())


@pytest.mark.slow
@pytest.mark.distributed
def test_divided_over_two_ranks(tmp_path: Path) -> None:
    run_distributed(on_two_ranks, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("lora_rank", [None, 4], ids=["full", "lora"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout(tokens: Path, tmp_path: Path, name: str, lora_rank: int | None) -> None:
    changes: dict[str, Any] = {"model__lora_rank": lora_rank, **LAYOUTS[name], **BUSY}
    run_distributed(run, 2, make_config(tokens, tmp_path / "plain", **changes))
    run_distributed(run, 2, make_config(tokens, tmp_path / "offloaded", **changes, **OFFLOAD))
    assert losses(tmp_path / "offloaded") == losses(tmp_path / "plain")
    _assert_equal(_on_disk(tmp_path / "offloaded", 19), _on_disk(tmp_path / "plain", 19))


def test_a_share_without_offloading_is_refused() -> None:
    config = TrainConfig()
    config.data.path, config.parallel.tensor_model_parallel_size = "x", 1
    config.optimizer.offload_fraction = 0.5
    with pytest.raises(ConfigError, match="_fraction has no effect without --optimizer_cpu_offl"):
        validate(config, world_size=1)
    config.optimizer.cpu_offload, config.optimizer.offload_fraction = True, 0.0
    with pytest.raises(ConfigError, match=r"--optimizer_offload_fraction 0\.0 must be above 0"):
        validate(config, world_size=1)
