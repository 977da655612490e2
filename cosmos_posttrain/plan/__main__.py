"""The command line of the planner: ``python -m cosmos_posttrain.plan``.

Flows in: flags. Flows out: a plan on standard output, or exit code 2 and one sentence.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.config import setting
from cosmos_posttrain.errors import CheckpointError, ConfigError
from cosmos_posttrain.geometry import parse_latent_shape
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.presets import PRESETS, preset
from cosmos_posttrain.models.reference_config import from_reference

if TYPE_CHECKING:
    from cosmos_posttrain.plan.layouts import Cluster

# Larger numbers are slips of the pen, and would take long to divide.
MAX_GPUS, MAX_GPUS_PER_NODE = 100_000, 1_000
DTYPE_NAMES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}
# GPUs' memory in GiB, rounded as their names are.
GPU_MEMORY_GB = {"A100": 80.0, "H100": 80.0, "H200": 140.0, "B200": 178.0}


@dataclass
class PlanConfig:
    """What to plan.

    Attributes:
        model: a preset, a folder with a checkpoint or ``config.json``, a ``config.json`` or
            ``model.json``, or a Hugging Face id.
        gpus: GPUs in all.
        gpu_memory_gb: memory of one, in GiB; None means the usual one of ``gpu``.
        gpus_per_node: GPUs of one machine.
        gpu: kind of GPU; gives peak and link speed.
        peak_tflops: dense peak in TFLOP/s, for a GPU that is not in the table.
        link_gb_per_second: bandwidth between GPUs of a node and direction, in GB/s.
        mfu: share of the peak before recomputation, bubble and transfers.
        latent_shape: grid T,H,W of a clip; None means the model's own.
        vocab_size: tokens of the tokenizer; None means the model's own.
        micro_batch_size: clips per forward pass and data-parallel rank.
        global_batch_size: clips per optimizer step.
        dtype: ``bf16`` or ``fp32``.
        distributed_optimizer: divide optimizer state over data-parallel ranks.
        max_layouts: rows of the table.
        json: print JSON and nothing else.
    """

    model: str = "4B"
    gpus: int = 8
    gpu_memory_gb: float | None = None
    gpus_per_node: int = 8
    gpu: str = "H100"
    peak_tflops: float | None = None
    link_gb_per_second: float | None = None
    mfu: float = 0.4
    latent_shape: str | None = None
    vocab_size: int | None = None
    micro_batch_size: int = 1
    global_batch_size: int = 32
    dtype: str = setting("bf16", choices=tuple(DTYPE_NAMES))
    distributed_optimizer: bool = True
    max_layouts: int = 10
    json: bool = False


FLAGS = (
    Flag("--model", "model", f"{', '.join(PRESETS)}, or a checkpoint, config.json or hub id"),
    Flag("--gpus", "gpus", "GPUs in all"),
    Flag("--gpu_memory_gb", "gpu_memory_gb", "memory of one GPU in GiB; by --gpu unless given"),
    Flag("--gpus_per_node", "gpus_per_node", "GPUs of one machine"),
    Flag("--gpu", "gpu", "kind of GPU: A100, H100, H200, B200, or any with --peak_tflops"),
    Flag("--peak_tflops", "peak_tflops", "dense bfloat16 peak of one GPU; by --gpu unless given"),
    Flag(
        "--link_gb_per_second", "link_gb_per_second", "GPU to GPU, one way; by --gpu unless given"
    ),
    Flag("--mfu", "mfu", "share of the peak before recomputation, bubble and transfers"),
    Flag("--latent_shape", "latent_shape", "grid T,H,W of a clip; the model's own unless given"),
    Flag("--vocab_size", "vocab_size", "codes of the tokenizer; the model's own unless given"),
    Flag("--micro_batch_size", "micro_batch_size", "clips per forward pass and rank"),
    Flag("--global_batch_size", "global_batch_size", "clips per optimizer step"),
    Flag("--dtype", "dtype", "weights and activations"),
    Flag("--distributed_optimizer", "distributed_optimizer", "divide optimizer state over ranks"),
    Flag("--max_layouts", "max_layouts", "rows of the table"),
    Flag("--json", "json", "print JSON and nothing else"),
)


def validate(config: PlanConfig) -> None:
    """Lists every problem of the flags at once.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    for name in ("gpus", "gpus_per_node", "micro_batch_size", "global_batch_size", "max_layouts"):
        if getattr(config, name) < 1:
            problems.append(f"--{name} {getattr(config, name)} must be at least 1")
    for name, most in (("gpus", MAX_GPUS), ("gpus_per_node", MAX_GPUS_PER_NODE)):
        if getattr(config, name) > most:
            problems.append(f"--{name} {getattr(config, name)} must be at most {most}")
    for name in ("gpu_memory_gb", "peak_tflops", "link_gb_per_second"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"--{name} {value:g} must be above 0")
    if not 0 < config.mfu <= 1:
        problems.append(f"--mfu {config.mfu:g} must lie above 0 and be at most 1")
    whole = config.gpus <= config.gpus_per_node or not config.gpus % max(config.gpus_per_node, 1)
    if not whole:
        problems.append(
            f"--gpus {config.gpus} must be a multiple of --gpus_per_node {config.gpus_per_node}"
        )
    if config.gpu_memory_gb is None and config.gpu not in GPU_MEMORY_GB:
        problems.append(f"the memory of --gpu {config.gpu} is not known: give --gpu_memory_gb")
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def read_model(path: str) -> tuple[ModelConfig, str]:
    """The model's numbers, and what the training script's ``--model_path`` takes for it.

    Raises:
        UserError: nothing there that describes a model.
    """
    name = path.removeprefix("random:")
    if name in PRESETS and not Path(name).exists():
        fresh = name.startswith("tiny") or path != name
        hub_id = f"nvidia/Cosmos-1.0-Autoregressive-{name}"
        return preset(name), f"random:{name}" if fresh else hub_id
    file = Path(path)
    if file.is_dir() and not (file / "model.pt").exists() and (file / "config.json").is_file():
        file = file / "config.json"
    if file.is_file() and file.suffix == ".json":
        return _read_json(file), str(file.parent)
    return _read_checkpoint(path), path


def _read_json(file: Path) -> ModelConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object; name a model's config.json.")
    return ModelConfig.from_json(values) if "num_layers" in values else from_reference(values)


def _read_checkpoint(path: str) -> ModelConfig:
    from cosmos_posttrain import hub
    from cosmos_posttrain.checkpoint.source import open_source

    if hub.looks_like_hub_id(path):
        # Only the config: the weights are not needed to plan.
        folder = hub.resolve(path, ("config.json",))
        return _read_json(folder / "config.json")
    return open_source(path).config


def _cluster(config: PlanConfig) -> Cluster:
    """The GPUs that the flags describe."""
    from cosmos_posttrain.plan.layouts import GIB, Cluster
    from cosmos_posttrain.plan.speed import hardware

    peak = None if config.peak_tflops is None else config.peak_tflops * 1e12
    link = None if config.link_gb_per_second is None else config.link_gb_per_second * 1e9
    gpu = hardware(config.gpu, config.mfu, peak, link)
    gigabytes = config.gpu_memory_gb or GPU_MEMORY_GB[config.gpu]
    return Cluster(config.gpus, gigabytes * GIB, config.gpus_per_node, gpu)


def main() -> int:
    """Plans and prints; returns the exit code."""
    description = "Plans a training run: parameters, memory per GPU, layouts that fit, speed."
    config = parse(PlanConfig, FLAGS, None, "python -m cosmos_posttrain.plan", description)
    validate(config)
    from cosmos_posttrain.plan import layouts, report
    from cosmos_posttrain.plan.memory import Workload

    model, model_path = read_model(config.model)
    if config.latent_shape is not None:
        model = model.at_grid(parse_latent_shape(config.latent_shape))
    if config.vocab_size is not None:
        model = dataclasses.replace(model, vocab_size=config.vocab_size)
    work = Workload(
        model,
        config.micro_batch_size,
        config.global_batch_size,
        DTYPE_NAMES[config.dtype],
        config.distributed_optimizer,
    )
    cluster = _cluster(config)
    fitting, smallest = layouts.search(work, cluster)
    if not fitting:
        raise layouts.refusal(config.model, work, cluster, smallest)
    plan = report.Plan(config.model, model_path, work, cluster, fitting)
    if config.json:
        print(json.dumps(report.to_json(plan), indent=2))
    else:
        report.print_plan(plan, config.max_layouts)
    return 0


if __name__ == "__main__":
    run_cli(main)
