"""What a checkpoint holds of the optimizer: Megatron's own form, every rank's part, no settings."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training_state
from helpers.distributed_run import run_distributed
from helpers.megatron_checkpoint import read_with_megatron, save_with_megatron
from helpers.training_state import TrainingState

from cosmos_posttrain.checkpoint import dist, guard
from cosmos_posttrain.checkpoint.torch_dist import TorchDistReader
from cosmos_posttrain.distributed.groups import Parallelism
from cosmos_posttrain.errors import CheckpointError, SaveError
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.training.optimizer import parts_of

TINY = preset("tiny", vocab_size=100)
MASTER = "optimizer.state.param."
TP2 = Parallelism(tensor=2)


def _assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def _on_disk(folder: Path) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(folder)
    return {key: reader.read(key) for key in reader.shapes}


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    return path


def megatron_and_we(tmp_path: Path) -> None:
    """Both writers, both readers, in float32 and bfloat16, on two data-parallel ranks."""
    for dtype in (torch.float32, torch.bfloat16):
        state = training_state.build(TINY, dtype)
        state.step(1)
        state.step(2)
        theirs, ours = _folder(tmp_path / f"{dtype}/theirs"), _folder(tmp_path / f"{dtype}/ours")
        save_with_megatron(theirs, state.model, state.optimizer)
        dist.save(ours, state.model, state.optimizer)
        expected = _on_disk(theirs)
        if dtype == torch.float32:  # the weights themselves are what the optimizer updates
            expected = {k: v for k, v in expected.items() if not k.startswith(MASTER)}
        _assert_equal(_on_disk(ours), expected)
        saved = state.tensors()
        state.step(3)
        for folder in (theirs, ours):
            again = training_state.build(TINY, dtype, seed=2)
            dist.load(folder, again.model, again.optimizer)
            _assert_equal(again.tensors(), saved)
            again.step(3)
            _assert_equal(again.tensors(), state.tensors())
        if dtype == torch.bfloat16:
            again.step(4)
            parts = [
                read_with_megatron(folder, again.model, again.optimizer)["optimizer"]
                for folder in (theirs, ours)
            ]
            for tensors, same in zip(
                *(part["param_state"].values() for part in parts), strict=True
            ):
                _assert_equal(tensors, same)
            settings = [part["optimizer"]["param_groups"] for part in parts]
            assert settings[0] == settings[1]
        # Pieces that two data-parallel ranks wrote, at tensor parallel size 2.
        models = [training_state.build(TINY, dtype, TP2, seed).model for seed in (2, 3)]
        dist.load(ours, models[0])
        read_with_megatron(ours, models[1])
        _assert_equal(*(dict(model.named_parameters()) for model in models))


@pytest.mark.slow
@pytest.mark.distributed
def test_megatron_and_we_write_the_same_and_read_each_other(tmp_path: Path) -> None:
    run_distributed(megatron_and_we, 2, tmp_path, timeout_seconds=300)


def other_dtype(tmp_path: Path) -> None:
    """From float32 to bfloat16 and back, on two data-parallel ranks."""
    state = training_state.build(TINY)
    state.step(1)
    dist.save(_folder(tmp_path / "float32"), state.model, state.optimizer)
    lower = training_state.build(TINY, torch.bfloat16, seed=2)
    dist.load(tmp_path / "float32", lower.model, lower.optimizer)
    exact = dict(state.model.named_parameters())
    for name, parameter in lower.model.named_parameters():
        assert torch.equal(parameter, exact[name].bfloat16()), name
    dist.save(_folder(tmp_path / "bfloat16"), lower.model, lower.optimizer)
    again = training_state.build(TINY, seed=3)
    dist.load(tmp_path / "bfloat16", again.model, again.optimizer)
    # Every rank's copy of the weights, not only the part that it updates.
    _assert_equal(again.tensors(), state.tensors())


@pytest.mark.distributed
def test_a_run_goes_on_in_another_dtype_with_its_exact_weights(tmp_path: Path) -> None:
    run_distributed(other_dtype, 2, tmp_path)


def disk_is_full_for_rank_one(tmp_path: Path) -> str:
    """Rank 1 may not write files of more than a megabyte."""
    state = training_state.build(TINY)
    folder = _folder(tmp_path / "weights")
    if torch.distributed.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
    with pytest.raises(SaveError) as error:
        dist.save(folder, state.model, state.optimizer)
    assert not (folder / guard.METADATA_FILE).exists()
    return str(error.value)


@pytest.mark.distributed
def test_all_ranks_say_what_one_could_not_write(tmp_path: Path) -> None:
    first, second = run_distributed(disk_is_full_for_rank_one, 2, tmp_path)
    assert first == second
    assert first.startswith("rank 1: ") and "weights cannot be written (File too large)" in first


class CountsInItsGroups(torch.optim.Optimizer):
    """Adam that keeps its state as Transformer Engine's and apex's FusedAdam do (GPU only)."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["exp_avg"].lerp_(parameter.grad, 0.1)
                state["exp_avg_sq"].lerp_(parameter.grad**2, 0.1)
                rate = group["lr"] / (1 - 0.9 ** group["step"])
                parameter.data -= rate * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)


def _build(fused: bool, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> TrainingState:
    state = training_state.build(TINY, dtype, seed=seed)
    if fused:
        for part in parts_of(state.optimizer.optimizer):
            part.optimizer = CountsInItsGroups(part.optimizer.param_groups, {})
    return state


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "counts in its groups"])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_the_next_step_is_that_of_the_unstopped_run(
    tmp_path: Path, fused: bool, num_steps: int
) -> None:
    state = _build(fused)
    for number in range(num_steps):
        state.step(number)
    dist.save(tmp_path, state.model, state.optimizer)
    again = _build(fused, seed=2)
    dist.load(tmp_path, again.model, again.optimizer)
    assert {group["step"] for group in again.optimizer.param_groups()} == {num_steps}
    _assert_equal(again.tensors(), state.tensors())
    for run in (state, again):
        run.step(7)
    _assert_equal(again.tensors(), state.tensors())


def test_settings_are_those_of_the_run_not_of_the_checkpoint(tmp_path: Path) -> None:
    state = _build(fused=False)
    for group in state.optimizer.optimizer.param_groups:
        group |= {"lr": 0.5, "max_lr": 0.5, "min_lr": 0.25, "weight_decay": 0.125}
    state.step(1)
    dist.save(tmp_path, state.model, state.optimizer)
    again = _build(fused=False)
    built = again.optimizer.param_groups()
    dist.load(tmp_path, again.model, again.optimizer)
    assert again.optimizer.param_groups() == [group | {"step": 1} for group in built]
    assert all(group["lr"] != 0.5 for group in built)


def test_a_checkpoint_without_optimizer_state_cannot_be_gone_on_from(tmp_path: Path) -> None:
    state = _build(fused=False)
    dist.save(tmp_path, state.model)
    dist.load(tmp_path, state.model)
    with pytest.raises(CheckpointError, match="no optimizer state; a run can start from it"):
        dist.load(tmp_path, state.model, state.optimizer)


def sizes(tmp_path: Path) -> tuple[int, int]:
    """What two data-parallel ranks say that they will write, and what is there then."""
    state = training_state.build(TINY, torch.bfloat16)
    folder = _folder(tmp_path / "weights")
    expected = dist.num_bytes(state.model, state.optimizer)
    # bfloat16 weights, float32 master weights and two moments.
    assert expected == 14 * sum(parameter.numel() for parameter in state.model.parameters())
    dist.save(folder, state.model, state.optimizer)
    return expected, sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.distributed
def test_num_bytes_is_what_is_written_by_half_of_it_each(tmp_path: Path) -> None:
    (expected, written), same = run_distributed(sizes, 2, tmp_path)
    assert same == (expected, written)
    assert expected < written < 1.05 * expected
    parts = [path.stat().st_size for path in (tmp_path / "weights").glob("*.distcp")]
    assert len(parts) == 2 and max(parts) < 1.05 * min(parts)
