"""The helper that other tests stand on: results by rank, errors with their cause, no leftovers."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
import torch

from helpers.distributed_run import DistributedTestError, run_distributed, run_script

pytestmark = pytest.mark.distributed


def _sum_of_ranks(offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    torch.distributed.init_process_group("gloo")
    total = offset + torch.distributed.get_rank()
    torch.distributed.all_reduce(total)
    return int(os.environ["RANK"]), total


def _second_rank_fails() -> None:
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        raise ValueError("the cause")
    torch.distributed.barrier()


def _sleep() -> None:
    time.sleep(60)


def test_results_come_back_by_rank() -> None:
    results = run_distributed(_sum_of_ranks, 2, torch.tensor([10.0]))
    assert [rank for rank, _ in results] == [0, 1]
    assert all(total.tolist() == [21.0] for _, total in results)


def test_the_rank_that_failed_first_is_reported() -> None:
    with pytest.raises(DistributedTestError, match=r"(?s)rank 1 failed.*ValueError: the cause"):
        run_distributed(_second_rank_fails, 2)


def test_a_process_that_hangs_is_killed() -> None:
    start = time.monotonic()
    with pytest.raises(DistributedTestError, match=r"still ran after 1\.0 s"):
        run_distributed(_sleep, 1, timeout_seconds=1.0)
    assert time.monotonic() - start < 30


def test_scripts_return_their_exit_code_and_are_killed_in_time() -> None:
    finished = run_script(["-c", "import sys; print('out'); sys.exit(3)"])
    assert (finished.returncode, finished.stdout) == (3, "out\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_script(["-c", "import time; time.sleep(60)"], timeout_seconds=0.5)
