"""The CPU as Megatron's device, and process groups that can be made again with other sizes."""

from __future__ import annotations

import pytest
import torch
from helpers.distributed_run import run_distributed
from megatron.core import parallel_state

from cosmos_posttrain import launch
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device, cuda_calls_mean_cpu, plain_torch
from cosmos_posttrain.errors import ConfigError

on_cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
PATCHED = ("current_device", "device_count", "set_device", "synchronize", "empty_cache")


@on_cpu_only
def test_cuda_means_the_cpu_inside_and_only_there() -> None:
    before = [getattr(torch.cuda, name) for name in PATCHED]
    with cpu_device():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().to("cuda").device.type == "cpu"
        assert torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu"
        assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
        with plain_torch():
            assert torch.zeros(2).type() == "torch.FloatTensor"
    assert [getattr(torch.cuda, name) for name in PATCHED] == before
    assert torch.zeros(2).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


@on_cpu_only
def test_everything_is_restored_after_an_error() -> None:
    before = [getattr(torch.cuda, name) for name in PATCHED]
    for context in (cpu_device, cuda_calls_mean_cpu):
        with pytest.raises(ValueError, match="inside"), context():
            raise ValueError("inside")
    assert [getattr(torch.cuda, name) for name in PATCHED] == before


def _sizes() -> list[tuple[int, int, int]]:
    seen = []
    for parallelism in (
        groups.Parallelism(tensor=2),
        groups.Parallelism(),
        groups.Parallelism(pipeline=2),
        groups.Parallelism(context=2),
        groups.Parallelism(context=2),
    ):
        groups.initialize(parallelism)
        seen.append(
            (
                parallel_state.get_tensor_model_parallel_world_size(),
                parallel_state.get_context_parallel_world_size(),
                parallel_state.get_data_parallel_world_size(),
            )
        )
    groups.shutdown()
    groups.shutdown()
    return seen


@pytest.mark.distributed
def test_groups_are_made_again_with_other_sizes() -> None:
    for seen in run_distributed(_sizes, 2):
        assert seen == [(2, 1, 1), (1, 1, 2), (1, 1, 1), (1, 2, 1), (1, 2, 1)]


def test_sizes_that_the_processes_cannot_hold() -> None:
    with pytest.raises(ConfigError, match=r"2 x 1 x 1 .* 1 was started.*--nproc-per-node=2"):
        groups.check_world(groups.Parallelism(tensor=2))
    with pytest.raises(ConfigError, match="at least 1"):
        groups.check_world(groups.Parallelism(context=0))


def test_a_plain_process_is_a_world_of_one() -> None:
    groups.initialize(groups.Parallelism(), seed=5)
    first = torch.rand(1)
    groups.initialize(groups.Parallelism(), seed=5)
    assert torch.equal(first, torch.rand(1))
    assert (launch.world_size(), launch.rank()) == (1, 0)
    groups.barrier()
