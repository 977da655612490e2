"""What a training run would do, without doing it: ``--dry_run`` of the training scripts.

Flows in: a ``TrainCommand``. Flows out: the layout, the memory of each rank, the data, time and
disk that the run takes, and its resolved config, on standard output; or the sentence with which it
would end. The run's own checks are called (``training/setup.py``), for a world of any size; nothing
is written, downloaded or started, and no weights are read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from datetime import timedelta

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.config import to_yaml
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.nemo import extra as nemo
from cosmos_posttrain.plan.command import NEMO, TrainCommand, validate
from cosmos_posttrain.plan.config import GPU_MEMORY_GB, RESERVE
from cosmos_posttrain.plan.layouts import GIB
from cosmos_posttrain.plan.looking import look_at_source
from cosmos_posttrain.plan.memory import (
    Layout,
    Memory,
    Workload,
    checkpoint_bytes,
    host_bytes,
    offloaded_bytes,
    stage_memory,
)
from cosmos_posttrain.plan.speed import Speed, hardware, speed
from cosmos_posttrain.training import setup
from cosmos_posttrain.training.config import TrainConfig

# Share of the peak that matrix products are taken to reach, as the planner's default.
MFU = 0.4


@dataclass(frozen=True)
class Look:
    """What was found out.

    Attributes:
        command: what was asked for.
        inputs: what the run would start from.
        layout: how the model would be spread.
        work: what would be trained.
        stages: memory of a GPU of each pipeline stage.
    """

    command: TrainCommand
    inputs: setup.Inputs
    layout: Layout
    work: Workload
    stages: list[Memory]

    @property
    def memory_bytes(self) -> float:
        """Of one GPU."""
        command = self.command
        return (command.gpu_memory_gb or GPU_MEMORY_GB[command.gpu]) * GIB

    @property
    def completed_steps(self) -> int:
        """Steps that the run in the folder has behind it."""
        resumed = self.inputs.resume_from
        return 0 if resumed is None else context.completed_steps(resumed)


def show(command: TrainCommand, takes_text: bool = False) -> int:
    """Prints what a run would do; returns the exit code.

    Args:
        command: the run, and what is assumed of the GPUs.
        takes_text: as for ``training.trainer.train``.

    Raises:
        UserError: with what the run would end, or what its GPUs or its disk could not hold.
    """
    validate(dataclasses.replace(command, dry_run=True))
    with contextlib.ExitStack() as closing:
        look = _look(command, closing, takes_text)
        disk, problems = _disk_lines(look)
        sections = {
            "layout": _layout_lines(look),
            "memory of a GPU": _memory_lines(look),
            "data": _data_lines(look),
            "time": _time_lines(look),
            "checkpoints": disk,
            "config": to_yaml(command.run_config).rstrip().splitlines(),
        }
        for name, lines in sections.items():
            launch.say("\n".join([f"{name}:", *(f"  {line}" for line in lines), ""]))
    problems = _memory_problems(look) + problems
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    if command.engine == NEMO and not nemo.is_installed():
        launch.say("note: NeMo 2 is not installed here, which --engine nemo needs where it runs.")
    launch.say("A dry run: it would run; nothing was written, and no weights were read.")
    return 0


def _look(command: TrainCommand, closing: contextlib.ExitStack, takes_text: bool) -> Look:
    config = command.run_config
    num_gpus = command.num_gpus or launch.world_size()
    layout = layout_of(config, num_gpus)
    if misfit := config.parallel.misfit(num_gpus):
        raise ConfigError(
            f"{misfit}, but this is a dry run of {num_gpus}; give --num_gpus "
            f"{math.prod(config.parallel.sizes)} or a multiple, or choose smaller sizes."
        )
    inputs = setup.open_inputs(config, closing, takes_text, setup.DryRun(num_gpus, look_at_source))
    work = Workload(
        inputs.model_config,
        config.micro_batch_size,
        config.global_batch_size,
        config.model.dtype or "bfloat16",
        keeps_average=config.optimizer.ema_decay is not None,
        heads_alone=config.model.num_medusa_heads > 0 and config.model.medusa_freeze_backbone,
        grad_reduce_in_bf16=config.optimizer.grad_reduce_in_bf16,
        offload_fraction=config.optimizer.offloaded_share,
    )
    stages = [stage_memory(work, layout, stage) for stage in range(layout.pipeline)]
    return Look(command, inputs, layout, work, stages)


def layout_of(config: TrainConfig, num_gpus: int) -> Layout:
    """How a run on so many processes is divided."""
    parallel = config.parallel
    sizes = parallel.sizes
    data = num_gpus // max(math.prod(sizes), 1)
    virtual = parallel.virtual_pipeline_model_parallel_size
    return Layout(
        *sizes,
        data,
        parallel.sequence_parallel,
        config.model.recompute,
        virtual,
        config.model.recompute_modules == "mlp",
    )


def _layout_lines(look: Look) -> list[str]:
    """The groups in Megatron's order: tensor, context, data, pipeline."""
    layout, per_node = look.layout, look.command.gpus_per_node
    num_gpus = layout.num_gpus
    nodes = math.ceil(num_gpus / per_node)
    lines = [
        f"{num_gpus} process{'es' * (num_gpus > 1)} on {nodes} machine{'s' * (nodes > 1)}: "
        f"TP {layout.tensor}, PP {layout.pipeline}, CP {layout.context}, DP {layout.data}"
        + (", sequence parallelism" if layout.sequence_parallel else "")
        + (", recomputation" if layout.recompute else "")
        + (", recomputation of feed-forward networks" if layout.recompute_mlp else "")
        + (f", interleaved in {layout.virtual} parts" if layout.virtual > 1 else "")
    ]
    stride = 1
    for name, size in (
        ("tensor", layout.tensor),
        ("context", layout.context),
        ("data", layout.data),
        ("pipeline", layout.pipeline),
    ):
        if size > 1:
            ranks = range(0, stride * size, stride)
            count = num_gpus // size
            lines.append(
                f"{count} {name}-parallel group{'s' * (count > 1)} of {size}, the first of ranks "
                + _shorten([str(rank) for rank in ranks])
            )
            if name in ("tensor", "context") and ranks[-1] >= per_node:
                lines.append(
                    f"note: the {name}-parallel groups reach over machines of {per_node} GPUs, "
                    "whose links are slow for them"
                )
        stride *= size
    return lines


def _shorten(words: list[str]) -> str:
    return ", ".join(words if len(words) <= 8 else [*words[:4], "...", words[-1]])


def _memory_problems(look: Look) -> list[str]:
    """What the GPUs could not hold."""
    needed, size = max(stage.total for stage in look.stages), look.memory_bytes
    if needed <= size * (1 - RESERVE):
        return []
    offload = "" if look.work.offload_fraction else "--optimizer_cpu_offload, "
    return [
        f"a GPU would need {needed / GIB:.1f} GiB of {size / GIB:g}, {RESERVE:.0%} of which stay "
        f"free: give --recompute, {offload}larger parallel sizes or a smaller --micro_batch_size "
        "(python -m cosmos_posttrain.plan names layouts), or other GPUs (--gpu, --gpu_memory_gb)"
    ]


def _memory_lines(look: Look) -> list[str]:
    layout, size = look.layout, look.memory_bytes / GIB
    ranks_of_stage = layout.num_gpus // layout.pipeline
    lines = []
    for number, stage in enumerate(look.stages):
        first, last = number * ranks_of_stage, (number + 1) * ranks_of_stage - 1
        who = f"rank {first}" if first == last else f"ranks {first} to {last}"
        parts = ", ".join(
            f"{name} {value / GIB:.1f}"
            for name, value in vars(stage).items()
            if value / GIB >= 0.05
        )
        lines.append(f"{who}: {stage.total / GIB:.1f} of {size:g} GiB ({parts})")
    hosts = {"--optimizer_cpu_offload": offloaded_bytes(look.work, layout)}
    if look.command.async_save:
        hosts["--async_save"] = host_bytes(look.work, layout)
    for flag, each in hosts.items():
        node = each * min(look.command.gpus_per_node, layout.num_gpus)
        if each:
            lines.append(
                f"{flag}: up to {each / 1e9:,.1f} GB of host memory a process, {node / 1e9:,.1f} "
                "GB a machine"
            )
    return lines


def _data_lines(look: Look) -> list[str]:
    config, inputs = look.command, look.inputs
    train, order, val = inputs.train_data, inputs.order, inputs.val_data
    test = train.other_split("test")
    samples = config.max_steps * config.global_batch_size
    tokens = samples * train.seq_length
    lines = [
        f"{config.data.sources}: clips of {' x '.join(map(str, train.latent_shape))}, "
        f"{train.seq_length:,} tokens of {train.vocab_size:,} codes",
        f"split {config.data.split_string}: {len(train):,} clips to train on, "
        f"{0 if val is None else len(val):,} to validate on, {len(test):,} to test on",
        f"an epoch is {order.num_samples:,} samples; {config.max_steps:,} steps of "
        f"{config.global_batch_size} are {samples:,} samples, {samples / order.num_samples:.2f} "
        f"epochs, {tokens:,} tokens",
    ]
    if look.completed_steps:
        lines.append(f"goes on behind step {look.completed_steps} of {inputs.resume_from}")
    if val is not None:
        every = config.val_check_interval or config.save_every_n_steps
        batches = min(config.limit_val_batches, math.ceil(len(val) / config.global_batch_size))
        lines.append(
            f"validation every {every} steps on {batches} batch{'es' * (batches > 1)} of "
            f"{config.global_batch_size} clips"
        )
    return lines


def _time_lines(look: Look) -> list[str]:
    command = look.command
    gpu = (
        hardware(command.gpu, MFU, dtype=look.work.dtype) if command.gpu in GPU_MEMORY_GB else None
    )
    if gpu is None:
        return [f"the speed of {command.gpu} is not known"]
    expected: Speed = speed(look.work, look.layout, gpu)
    left = max(command.max_steps - look.completed_steps, 0)
    seconds = round(left * expected.step_seconds)
    return [
        f"about {expected.step_seconds:,.1f} s a step, {timedelta(seconds=seconds)} for {left:,} "
        f"steps, if {command.gpu} matrix products reach {MFU:.0%} of their peak; without "
        f"validation and saving{', and what the CPU updates' * (look.work.offload_fraction > 0)}"
    ]


def _disk_lines(look: Look) -> tuple[list[str], list[str]]:
    """Checkpoints and their size, and what the disk could not hold."""
    config = look.command
    folder, every = look.inputs.folder, config.save_every_n_steps
    size = folder.size(checkpoint_bytes(look.work))
    steps = range(look.completed_steps, config.max_steps)
    saved = sum((step + 1) % every == 0 or step + 1 == config.max_steps for step in steps)
    at_once = _most_at_once(config, saved, len(context.list_checkpoints(folder.log_dir)))
    free = files.free_bytes(folder.log_dir)
    lines = [
        f"{saved} to be written, every {every} steps and at the end, {size / 1e9:,.3f} GB each",
        f"at most {at_once} more at once than now: {at_once * size / 1e9:,.3f} GB of "
        f"{free / 1e9:,.3f} GB free in {config.log_dir}",
    ]
    if at_once * size <= free:
        return lines, []
    return lines, [
        f"{at_once} checkpoint{'s' * (at_once > 1)} of {size / 1e9:,.3f} GB would lie in "
        f"{config.log_dir} at once, but only {free / 1e9:,.3f} GB are free there: make room, "
        "choose another --log_dir, or keep fewer with --keep_last_n"
    ]


def _most_at_once(config: TrainConfig, saved: int, present: int) -> int:
    """Checkpoints that the disk holds on top of those that are there; one goes after the next."""
    kept = [number for number in (config.save_top_k, config.keep_last_n) if number is not None]
    if not kept or -1 in kept:
        return saved
    newest = config.keep_last_n or 1
    best = max(config.save_top_k or 0, 0)
    return min(saved, max(newest + best + 1 - present, 1))
