"""Training on a GPU: the CPU's curve, bfloat16, resuming, the move to the CPU, NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.distributed_run import run_script
from helpers.run_case import losses

pytestmark = pytest.mark.gpu


def train(
    tokens: Path,
    log_dir: Path,
    model: str | Path,
    *flags: str,
    dtype: str,
    max_steps: int = 20,
    num_gpus: int = 1,
) -> list[float]:
    """Losses of a run of train_general.py on so many GPUs, or on the CPU, in its default dtype."""
    processes = max(num_gpus, 1)
    # fmt: off
    command = [
        "train_general.py", "--data_path", tokens, "--log_dir", log_dir, "--model_path", model,
        "--split_string", "3,1,1", "--global_batch_size", "4", "--lr", "3e-4",
        "--lr_decay_style", "constant", "--lr_warmup_steps", "2",  # at any number of steps
        "--max_steps", str(max_steps), "--save_every_n_steps", "10",
        "--tensor_model_parallel_size", str(processes), *flags,
    ]
    # fmt: on
    # Some images let matrix products round to TF32.
    env = {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
    if not num_gpus:
        env["CUDA_VISIBLE_DEVICES"] = ""
    finished = run_script(command, processes, env=env)
    assert finished.returncode == 0, finished.stderr
    assert f"torch.{dtype}" in finished.stdout
    return losses(log_dir)


def largest_difference(expected: list[float], found: list[float]) -> float:
    return max(abs(a - b) / a for a, b in zip(expected, found, strict=True))


@pytest.fixture(scope="module")
def start(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint: fresh weights on a GPU come from the GPU's own random numbers."""
    run = tmp_path_factory.mktemp("start") / "run"
    train(tokens, run, "random:tiny", dtype="float32", max_steps=3, num_gpus=0)
    return run


@pytest.fixture(scope="module")
def curve(tokens: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """20 steps of float32 on the CPU."""
    run = tmp_path_factory.mktemp("cpu") / "run"
    return train(tokens, run, start, dtype="float32", num_gpus=0)


FLOAT32 = ("--dtype", "float32")
# Layouts on the CPU differ by 1e-5; gradients of logits rounded to bfloat16 gave 2e-4 there.
TOLERANCE = 1e-4


def test_float32_gives_the_curve_of_the_cpu_and_goes_on_there(
    tokens: Path, start: Path, curve: list[float], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tokens, run, start, *FLOAT32, dtype="float32", max_steps=10)
    found = train(tokens, run, start, *FLOAT32, dtype="float32")
    assert largest_difference(curve, found) < TOLERANCE
    moved = train(tokens, run, start, dtype="float32", max_steps=22, num_gpus=0)
    assert moved[:20] == found and max(moved[20:]) < 0.6 * curve[0]


def test_bfloat16_is_the_default_and_learns(
    tokens: Path, start: Path, curve: list[float], tmp_path: Path
) -> None:
    found = train(tokens, tmp_path / "run", start, dtype="bfloat16")
    # On the CPU, bfloat16 differs from float32 by up to 0.01.
    assert largest_difference(curve, found) < 0.04
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


@pytest.mark.distributed
@pytest.mark.parametrize("flags", [(), ("--sequence_parallel",)], ids=["tp", "sp"])
def test_two_gpus_share_a_model(
    tokens: Path, start: Path, curve: list[float], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run = tmp_path / "run"
    found = train(tokens, run, start, *FLOAT32, *flags, dtype="float32", num_gpus=2)
    assert largest_difference(curve, found) < TOLERANCE


@pytest.mark.parametrize("share", ["1.0", "0.5"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizer_in_host_memory(
    tokens: Path, start: Path, tmp_path: Path, dtype: str, share: str
) -> None:
    """The curve of the one on the GPU, also from its checkpoint on."""
    flags = ("--dtype", dtype, "--optimizer_cpu_offload", "--optimizer_offload_fraction", share)
    expected = train(tokens, tmp_path / "plain", start, *flags[:2], dtype=dtype)
    found = train(tokens, tmp_path / "host", start, *flags, dtype=dtype)
    train(tokens, tmp_path / "moved", start, *flags[:2], dtype=dtype, max_steps=10)
    moved = train(tokens, tmp_path / "moved", start, *flags, dtype=dtype)
    # Sums on a GPU come in another order each time; bfloat16 makes more of it.
    bound = TOLERANCE if dtype == "float32" else 0.04
    assert largest_difference(expected, found) < bound
    assert largest_difference(expected, moved) < bound
