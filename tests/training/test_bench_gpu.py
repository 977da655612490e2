"""The benchmark of one GPU, run whole on the CPU, and what the benchmarks refuse."""

from __future__ import annotations

import gc
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR
from helpers.script_here import run_here

GPU, TRAIN = "benchmarks/bench_gpu.py", "benchmarks/bench_train.py"
ONLY_ON_A_GPU = ("mfu", "share_of_matmul_rate", "peak_gib", "reserved_gib", "peak_over_plan")


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks import one another, as they do where one is started."""
    monkeypatch.syspath_prepend(str(REPOSITORY_DIR / "benchmarks"))


def test_it_measures_the_tiny_model_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output, traces = tmp_path / "figures.json", tmp_path / "traces"
    arguments = "--preset tiny --steps 2 --warmup 1 --global_batch_size 1".split()
    arguments += "--recompute none --recompute full".split()
    paths = ["--trace", traces, "--output", output]
    code, error = run_here(GPU, [*arguments, *paths], monkeypatch, capsys)
    assert code == 0, error
    found = json.loads(output.read_text())
    assert [found[name] for name in ("gpu", "peak_flops", "matmul_flops")] == [None] * 3
    kept, again = found["rows"]
    assert (kept["recompute"], again["recompute"]) == ("none", "full")
    assert again["planned_gib"] < kept["planned_gib"]
    for row in (kept, again):
        assert row["fits"] and [row[name] for name in ONLY_ON_A_GPU] == [None] * 5
        mean_seconds = 1200 / row["tokens_per_second"]  # of two steps, whose median is the mean
        assert row["median_step_seconds"] == pytest.approx(mean_seconds)
        assert row["step_time_jitter"] >= 1
        shares = {kernel["kind"]: kernel["share"] for kernel in row["kernels"]}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares[kind] for kind in ("matrix products", "attention", "copies")) > 0
        trace = json.loads((traces / f"tiny-{row['recompute']}.pt.trace.json").read_text())
        assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert len(list(traces.iterdir())) == 2


def tensor_storages() -> dict[int, int]:
    """Bytes of all storages that tensors in this process hold, by address."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    tensors = [tensor for tensor in tensors if tensor.layout == torch.strided]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_a_run_is_let_go_before_the_next(tmp_path: Path) -> None:
    """Two of 4B would fill any GPU."""
    bench = importlib.import_module("bench_gpu")
    args: Any = type("Arguments", (), {"preset": "tiny", "compile": False, "trace": None})
    args.global_batch_size = args.micro_batch_size = args.warmup = args.steps = 1
    args.optimizer_cpu_offload = False
    before = tensor_storages()
    bench.run_case(args, "full", tmp_path)
    new = [size for address, size in tensor_storages().items() if address not in before]
    # Weights and gradients are buffers of two and four bytes for each parameter.
    assert max(new, default=0) < bench.PRESETS["tiny"].num_parameters


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel", "optimizer"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("void at::native::reduce_kernel<512, 1, ReduceOp>", "sums and norms"),
        ("something_else", "other"),
    ],
)
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert importlib.import_module("bench_gpu").kind_of(kernel) == kind


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--preset 4B needs a GPU, and CUDA is absent; --preset tiny runs here."),
        (["--preset", "tiny", "--steps", "0"], "--steps 0 and --warmup 3 must be at least 1: "),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, error = run_here(GPU, arguments, monkeypatch, capsys)
    assert code == 2 and error.startswith(f"error: {sentence}") and error.count("\n") == 1


def test_loops_on_the_cpu_are_not_compared_with_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, error = run_here(TRAIN, ["--size", "30M"], monkeypatch, capsys)
    assert code == 2 and "give CUDA_VISIBLE_DEVICES= before the command" in error
