"""A plan as tables for people, as JSON for machines, and as the command line to use.

Flows in: the search's results. Flows out: text on standard output.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cosmos_posttrain.plan.layouts import GIB, Candidate, Cluster, describe
from cosmos_posttrain.plan.memory import (
    FRAGMENTATION,
    FRAMEWORK_BYTES,
    Layout,
    Workload,
    checkpoint_bytes,
    host_bytes,
    offloaded_bytes,
)
from cosmos_posttrain.plan.parameters import parameter_groups

if TYPE_CHECKING:
    from rich.console import Console

# Of the tables, wherever they go: a pipe has no width of its own, and a narrower one cuts columns.
WIDTH = 118


@dataclass(frozen=True)
class Settings:
    """What the command line says beside the layout.

    Attributes:
        model_path: what the training script's ``--model_path`` takes.
        ema_decay: of the weights' average; None keeps none.
        async_save: whether checkpoints are written from copies in host memory.
    """

    model_path: str
    ema_decay: float | None = None
    async_save: bool = False


@dataclass(frozen=True)
class TrainingPlan:
    """Everything that is printed.

    Attributes:
        name: the model as it was asked for.
        settings: of the command line.
        work: what is trained.
        cluster: on what.
        candidates: layouts that fit, fastest first; at least one.
    """

    name: str
    settings: Settings
    work: Workload
    cluster: Cluster
    candidates: list[Candidate]


def train_arguments(plan: TrainingPlan, layout: Layout) -> list[str]:
    """Arguments of the training script for a layout."""
    work, settings = plan.work, plan.settings
    arguments = ["--model_path", settings.model_path, "--data_path", "DATA", "--log_dir", "LOG_DIR"]
    arguments += ["--dtype", work.dtype]
    for name, size in (
        ("tensor", layout.tensor),
        ("pipeline", layout.pipeline),
        ("context", layout.context),
    ):
        middle = "parallel" if name == "context" else "model_parallel"
        arguments += [f"--{name}_{middle}_size", str(size)]
    arguments += ["--sequence_parallel"] * layout.sequence_parallel
    arguments += ["--recompute"] * layout.recompute
    if work.model.lora is not None:
        arguments += ["--lora_rank", str(work.model.lora.rank)]
    if work.model.num_medusa_heads:
        arguments += ["--medusa_num_heads", str(work.model.num_medusa_heads)]
        arguments += ["--no-medusa_freeze_backbone"] * (not work.heads_alone)
    if settings.ema_decay is not None:
        arguments += ["--ema_decay", str(settings.ema_decay)]
    arguments += ["--grad_reduce_in_bf16"] * work.grad_reduce_in_bf16
    if work.offload_fraction:
        arguments += ["--optimizer_cpu_offload"]
        if work.offload_fraction < 1:
            arguments += ["--optimizer_offload_fraction", str(work.offload_fraction)]
    arguments += ["--async_save"] * settings.async_save
    arguments += ["--micro_batch_size", str(work.micro_batch_size)]
    arguments += ["--global_batch_size", str(work.global_batch_size)]
    return arguments


def command(plan: TrainingPlan, layout: Layout) -> str:
    """The whole command line, for every node."""
    script = "train_video2world.py" if plan.work.model.is_video2world else "train_general.py"
    cluster = plan.cluster
    if cluster.num_nodes == 1:
        launcher = f"torchrun --standalone --nproc-per-node {cluster.num_gpus}"
    else:
        launcher = (
            f"torchrun --nnodes {cluster.num_nodes} --nproc-per-node {cluster.gpus_per_node} "
            "--rdzv-backend c10d --rdzv-endpoint $MASTER_ADDR:29500"
        )
    return f"{launcher} {script} {shlex.join(train_arguments(plan, layout))}"


def _candidate_json(work: Workload, candidate: Candidate) -> dict[str, Any]:
    used = dataclasses.asdict(candidate.memory) | {"total": candidate.memory.total}
    return {
        "layout": dataclasses.asdict(candidate.layout),
        "memory_bytes": {name: round(value) for name, value in used.items()},
        "host_bytes": round(host_bytes(work, candidate.layout)),
        "offloaded_bytes": round(offloaded_bytes(work, candidate.layout)),
        "speed": dataclasses.asdict(candidate.speed),
    }


def to_json(plan: TrainingPlan) -> dict[str, Any]:
    """The plan as plain values; memory in bytes per GPU, times in seconds."""
    groups = parameter_groups(plan.work.model)
    best = plan.candidates[0]
    return {
        "model": plan.name,
        "parameters": {
            **groups,
            "total": sum(groups.values()),
            "vocabulary_padding": plan.work.model.num_padding_parameters,
        },
        "latent_shape": list(plan.work.model.latent_shape),
        "seq_length": plan.work.model.seq_length,
        "micro_batch_size": plan.work.micro_batch_size,
        "global_batch_size": plan.work.global_batch_size,
        "dtype": plan.work.dtype,
        "grad_reduce_in_bf16": plan.work.grad_reduce_in_bf16,
        "offload_fraction": plan.work.offload_fraction,
        "distributed_optimizer": plan.work.distributed_optimizer,
        "checkpoint_bytes": checkpoint_bytes(plan.work),
        "num_gpus": plan.cluster.num_gpus,
        "gpu_memory_bytes": round(plan.cluster.memory_bytes),
        "hardware": dataclasses.asdict(plan.cluster.hardware),
        "reserve": plan.cluster.reserve,
        "layouts": [_candidate_json(plan.work, candidate) for candidate in plan.candidates],
        "recommended": _candidate_json(plan.work, best),
        "command": command(plan, best.layout),
    }


def _print_parameters(console: Console, plan: TrainingPlan) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    groups = parameter_groups(plan.work.model)
    table = Table("parameters", title=plan.name, title_justify="left", box=SIMPLE)
    table.add_column("number", justify="right")
    for name, count in groups.items():
        if count:
            table.add_row(name, f"{count:,}")
    table.add_section()
    table.add_row("total", f"{sum(groups.values()):,}")
    console.print(table)
    padding = plan.work.model.num_padding_parameters
    if padding:
        console.print(f"{padding:,} of them only pad the vocabulary to a multiple of 64.")


def _print_layouts(console: Console, plan: TrainingPlan, limit: int) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    shown = plan.candidates[:limit]
    title = f"layouts that fit: {len(shown)} of {len(plan.candidates)}, fastest first; GiB per GPU"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    names = "TP PP CP DP SP rec weights grads optim activ logits work other total"
    for name in [*names.split(), "tokens/s", "s/step", "MFU"]:
        table.add_column(name, justify="right", no_wrap=True)
    for candidate in shown:
        layout, speed = candidate.layout, candidate.speed
        used = [*dataclasses.astuple(candidate.memory), candidate.memory.total]
        sizes = (layout.tensor, layout.pipeline, layout.context, layout.data)
        table.add_row(
            *map(str, sizes),
            "yes" if layout.sequence_parallel else "no",
            "yes" if layout.recompute else "no",
            *(f"{value / GIB:.1f}" for value in used),
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.step_seconds:.2f}",
            f"{speed.mfu:.0%}",
        )
    console.print(table)


def print_plan(plan: TrainingPlan, limit: int) -> None:
    """Prints the tables, the assumptions in one line each, and the command line."""
    from rich.console import Console

    console = Console(width=WIDTH, highlight=False)
    work, gpu = plan.work, plan.cluster.hardware
    grid = " x ".join(map(str, work.model.latent_shape))
    _print_parameters(console, plan)
    console.print(
        f"\nClips of {grid}, {work.model.seq_length:,} tokens, {work.micro_batch_size} per forward "
        f"pass and {work.global_batch_size} per step, {work.dtype}, on {plan.cluster.num_gpus} "
        f"{gpu.name} of {plan.cluster.memory_bytes / GIB:g} GB."
    )
    _print_layouts(console, plan, limit)
    console.print(
        "SP: sequence parallelism; rec: recomputation; other: "
        f"{FRAMEWORK_BYTES / GIB:g} GiB and {FRAGMENTATION:.0%}; {plan.cluster.reserve:.0%} of the "
        f"memory stay free. Speed: {gpu.mfu:.0%} of {gpu.peak_flops / 1e12:,.0f} TFLOP/s before "
        "recomputation, bubble and transfers. "
        "All are estimates; docs/plan.md has the formulas."
    )
    if not work.distributed_optimizer:
        console.print(
            "train_general.py always divides the optimizer: without, this is only a comparison."
        )
    best = plan.candidates[0].layout
    console.print(f"\nRecommended: {describe(best)}.")
    console.print(_storage(plan, best))
    nodes = " on every node" if plan.cluster.num_nodes > 1 else ""
    console.print(f"Command line{nodes}, with your own DATA and LOG_DIR:")
    print(command(plan, best))


def _storage(plan: TrainingPlan, layout: Layout) -> str:
    """What a run needs beside its GPUs."""
    text = f"A checkpoint takes {checkpoint_bytes(plan.work) / 1e9:,.0f} GB on disk."
    hosts = {"--optimizer_cpu_offload": offloaded_bytes(plan.work, layout)}
    if plan.settings.async_save:
        hosts["--async_save"] = host_bytes(plan.work, layout)
    per_node = min(plan.cluster.gpus_per_node, plan.cluster.num_gpus)
    for flag, each in hosts.items():
        if each:
            text += (
                f" {flag} holds up to {each / 1e9:,.1f} GB of host memory a process, "
                f"{per_node * each / 1e9:,.0f} GB a node."
            )
    return text
