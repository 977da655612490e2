"""Training on one GPU: speed against its peak, and memory against the plan.

A published size with random weights at its own grid (4B: 12,800 tokens a clip), in bfloat16: steps
of ``Trainer.train_step``, as train_general.py runs it, with activations kept, with those of the
feed-forward networks computed again (``selective``), and with all (``full``). A step lasts from the
end of the one before to its own; nothing waits for the GPU but the trainer itself. MFU counts model
FLOPs (docs/training.md), so recomputation lowers it. The plan is ``plan.memory`` without the
framework's share, and the peak that of torch's allocator.

    python benchmarks/bench_gpu.py                                  # 4B, on a GPU of 140 GB
    python benchmarks/bench_gpu.py --recompute full --optimizer_cpu_offload --trace TRACES
    python benchmarks/bench_gpu.py --preset tiny                    # also on the CPU
"""

import argparse
import contextlib
import gc
import math
import re
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, not installed

from bench_train import data_settings

from cosmos_posttrain import environment, files, launch
from cosmos_posttrain.config import merge
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.presets import PRESETS
from cosmos_posttrain.plan.memory import Layout, Workload, memory
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.flops import flops_per_token
from cosmos_posttrain.training.metrics import jitter, peak_flops_here
from cosmos_posttrain.training.trainer import Trainer

SIZES = [name for name, model in PRESETS.items() if not model.is_video2world]
RECOMPUTE = {
    "none": Layout(),
    "selective": Layout(recompute_mlp=True),
    "full": Layout(recompute=True),
}
GIB = 2**30
MATRIX, PRODUCTS, ROUNDS = 8192, 50, 5  # a product of two such matrices fills any GPU
PROFILED_STEPS = 2
PATHS = ("work_dir", "trace", "output")
# The first one that is found in a kernel's name; of the CPU, in an operation's.
KERNELS = {
    "communication": "nccl|gloo|c10d",
    "attention": "flash|fmha|attention|sdpa",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitk|::(add)?mm\b|::bmm|matmul|linear",
    "optimizer": "multi_tensor|adam|foreach",
    "copies": "memcpy|memset|copy|fill|::zero",
    "rows and indices": "embedding|index|gather|scatter",
    "sums and norms": "norm|reduce|softmax|sum|mean",
    "elementwise": "elementwise|triton|::(mul|add|sub|div|silu|neg|cat|where|rsqrt|pow|sqrt)",
}


def matmul_rate() -> float | None:
    """FLOP/s of bfloat16 matrix products alone, the median of some rounds; None on the CPU."""
    if launch.device().type == "cpu":
        return None
    left, right = torch.randn(2, MATRIX, MATRIX, dtype=torch.bfloat16, device=launch.device())
    rates = []
    for _ in range(ROUNDS + 1):  # the first one warms up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(PRODUCTS):
            left @ right
        end.record()
        end.synchronize()
        rates.append(PRODUCTS * 2 * MATRIX**3 / (start.elapsed_time(end) / 1e3))
    return statistics.median(rates[1:])


def open_trainer(args: argparse.Namespace, recompute: str, folder: Path) -> Trainer:
    """A run on random tokens, set up as train_general.py sets it up."""
    layout = RECOMPUTE[recompute]
    settings = {
        **data_settings(folder, PRESETS[args.preset]),
        "model.path": f"random:{args.preset}",
        "model.dtype": "bfloat16",
        "model.recompute": layout.recompute,
        "model.recompute_modules": "mlp" if layout.recompute_mlp else None,
        "model.compile": args.compile,
        "optimizer.cpu_offload": args.optimizer_cpu_offload,
        "parallel.tensor_model_parallel_size": 1,
        "global_batch_size": args.global_batch_size,
        "micro_batch_size": args.micro_batch_size,
        "max_steps": args.warmup + args.steps + PROFILED_STEPS,
        "log_dir": str(folder / recompute),
    }
    return Trainer(merge(TrainConfig, None, list(settings.items())))


def timed(trainer: Trainer, batches: Iterator, num_steps: int) -> list[float]:
    """Seconds of each step, waiting for its batch included."""
    seconds, ended = [], time.perf_counter()
    for _ in range(num_steps):
        loss = trainer.train_step(next(batches))["reduced_train_loss"]
        assert math.isfinite(loss), "the loss is not finite"
        before, ended = ended, time.perf_counter()
        seconds.append(ended - before)
    return seconds


def traced(trainer: Trainer, batches: Iterator, path: Path) -> list[dict]:
    """Some steps under torch's profiler: a trace in a file, and the time of each kind of kernel."""
    on_gpu = launch.device().type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        timed(trainer, batches, PROFILED_STEPS)
        if on_gpu:
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
    times: Counter = Counter()
    for item in profiler.key_averages():
        if not on_gpu:
            times[kind_of(item.key)] += item.self_cpu_time_total
        elif item.device_type == DeviceType.CUDA and not item.is_user_annotation:
            times[kind_of(item.key)] += item.self_device_time_total
    return [
        {"kind": kind, "ms_per_step": value / 1e3 / PROFILED_STEPS, "share": value / times.total()}
        for kind, value in times.most_common()
    ]


def kind_of(kernel: str) -> str:
    """What a kernel does, by its name; of the CPU, an operation."""
    found = (kind for kind, pattern in KERNELS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other")


def run_case(args: argparse.Namespace, recompute: str, folder: Path) -> dict[str, Any]:
    """Builds a run, takes its steps and lets go of it.

    Returns:
        Its steps' ``seconds``; of a GPU ``peak`` and ``reserved`` bytes; ``kernels`` where traced.
    """
    on_gpu = launch.device().type == "cuda"
    found: dict[str, Any] = {"peak": None, "reserved": None}
    trainer = open_trainer(args, recompute, folder)
    with contextlib.closing(trainer), contextlib.closing(trainer.batches()) as batches:
        timed(trainer, batches, args.warmup)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found["seconds"] = timed(trainer, batches, args.steps)
        if on_gpu:
            found["peak"] = torch.cuda.max_memory_allocated()
            found["reserved"] = torch.cuda.max_memory_reserved()
        if args.trace is not None:
            path = args.trace / f"{args.preset}-{recompute}.pt.trace.json"
            found["kernels"] = traced(trainer, batches, path)
    return found


def measure(args: argparse.Namespace, recompute: str, matmul: float | None) -> dict[str, Any]:
    """One way of recomputing, as a row of the output; null is what only a GPU tells."""
    model = PRESETS[args.preset]
    work = Workload(
        model,
        args.micro_batch_size,
        args.global_batch_size,
        gpu_kernels=launch.device().type == "cuda",
        offload_fraction=float(args.optimizer_cpu_offload),
    )
    plan = memory(work, RECOMPUTE[recompute])
    planned = plan.total - plan.overhead
    row: dict[str, Any] = {"recompute": recompute, "fits": True, "planned_gib": planned / GIB}
    gc.collect()  # the run before held itself
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        try:
            found = run_case(args, recompute, Path(folder))
        except torch.OutOfMemoryError:
            row["fits"] = False
    if not row["fits"]:
        return row
    seconds, peak, reserved = found["seconds"], found["peak"], found["reserved"]
    rate = args.global_batch_size * model.seq_length * len(seconds) / sum(seconds)
    flops, sheet = rate * flops_per_token(model), peak_flops_here()
    return row | {
        "tokens_per_second": rate,
        "median_step_seconds": statistics.median(seconds),
        "step_time_jitter": jitter(deque(seconds)),
        "model_tflops": flops / 1e12,
        "mfu": None if sheet is None else flops / sheet,
        "share_of_matmul_rate": None if matmul is None else flops / matmul,
        "peak_gib": None if peak is None else peak / GIB,
        "reserved_gib": None if reserved is None else reserved / GIB,
        "peak_over_plan": None if peak is None else peak / planned,
        "kernels": found.get("kernels"),
    }


def show(row: dict[str, Any]) -> None:
    """Prints a row, and its kinds of kernels as a table."""
    print(f"recompute {row['recompute']}: planned {row['planned_gib']:.2f} GiB", end="")
    if not row["fits"]:
        print(", does not fit")
        return
    if row["peak_gib"] is not None:
        print(
            f", peak {row['peak_gib']:.2f} ({row['peak_over_plan']:.3f} of the plan), reserved "
            f"{row['reserved_gib']:.2f}",
            end="",
        )
    print(
        f"\n  {row['tokens_per_second']:,.0f} tokens/s, {row['median_step_seconds']:.3f} s a step, "
        f"jitter {row['step_time_jitter']:.3f}, {row['model_tflops']:.2f} model TFLOP/s"
    )
    shares = {"mfu": "of the data sheet's peak", "share_of_matmul_rate": "of the measured rate"}
    for name, what in shares.items():
        if row[name] is not None:
            print(f"  {row[name]:.1%} {what}")
    for kernel in row["kernels"] or ():
        print(f"  {kernel['kind']:18s} {kernel['ms_per_step']:10.2f} ms {kernel['share']:7.1%}")


def parse_arguments() -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: what it asks for cannot be measured here.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=SIZES, default="4B")
    parser.add_argument(
        "--recompute", action="append", choices=list(RECOMPUTE), help="default: each in turn"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--global_batch_size", type=int, default=4, help="clips a step")
    parser.add_argument("--micro_batch_size", type=int, default=1, help="clips a forward pass")
    parser.add_argument("--optimizer_cpu_offload", action="store_true", help="for smaller GPUs")
    parser.add_argument("--compile", action="store_true", help="as train_general.py's")
    parser.add_argument("--trace", type=Path, help="folder for traces; also prints kernel times")
    parser.add_argument(
        "--work_dir", type=Path, help="a run wants room for a checkpoint here; writes none"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if args.steps < 1 or args.warmup < 1:
        raise ConfigError(
            f"--steps {args.steps} and --warmup {args.warmup} must be at least 1: the first step "
            "loads and allocates."
        )
    if launch.world_size() > 1:
        raise ConfigError("this measures one GPU; start it with plain python, not torchrun.")
    if args.preset != "tiny" and launch.device().type == "cpu":
        raise ConfigError(
            f"--preset {args.preset} needs a GPU, and CUDA is absent; --preset tiny runs here."
        )
    return args


def main() -> None:
    """Measures, prints, and writes the figures as JSON."""
    args = parse_arguments()
    device, model = launch.device(), PRESETS[args.preset]
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    print(
        f"{args.preset}, {model.num_parameters / 1e6:,.1f}M parameters, {model.seq_length:,} "
        f"tokens a clip, {args.global_batch_size} clips a step in forward passes of "
        f"{args.micro_batch_size}, {args.steps} steps after {args.warmup}, {gpu or 'CPU'}"
    )
    matmul, sheet = matmul_rate(), peak_flops_here()
    if gpu is None:
        print("no GPU: no MFU, no rate of matrix products, no peak of memory (null in the output)")
    else:
        stated = "not known" if sheet is None else f"{sheet / 1e12:.0f} TFLOP/s"
        print(f"bfloat16: data sheet's peak {stated}, measured {matmul / 1e12:.0f} TFLOP/s")
    rows = []
    for recompute in args.recompute or RECOMPUTE:
        rows.append(measure(args, recompute, matmul))
        show(rows[-1])
    if args.output is not None:
        settings = {name: value for name, value in vars(args).items() if name not in PATHS}
        described = {"gpu": gpu, "peak_flops": sheet, "matmul_flops": matmul}
        described |= {"settings": settings, "environment": environment.describe()}
        files.write_json(args.output, described | {"rows": rows})


if __name__ == "__main__":
    launch.run_cli(main)
