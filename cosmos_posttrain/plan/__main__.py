"""The command line of the planner: ``python -m cosmos_posttrain.plan``.

Flows in: flags. Flows out: a plan on standard output, or exit code 2 and one sentence.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.cli import parse
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.geometry import parse_latent_shape
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.lora_shapes import lora_for
from cosmos_posttrain.models.presets import PRESETS, preset
from cosmos_posttrain.models.reference_config import from_reference
from cosmos_posttrain.plan.config import (
    DEFAULT_MODEL,
    DTYPE_NAMES,
    FLAGS,
    GPU_MEMORY_GB,
    HUB_PREFIX,
    PlanConfig,
    validate,
)

if TYPE_CHECKING:
    from cosmos_posttrain.plan.layouts import Cluster


def read_model(path: str) -> tuple[ModelConfig, str]:
    """The model's numbers, and what the training script's ``--model_path`` takes for it.

    Raises:
        UserError: nothing there that describes a model.
    """
    name = path.removeprefix("random:")
    if name in PRESETS and not Path(name).exists():
        fresh = name.startswith("tiny") or path != name
        return preset(name), f"random:{name}" if fresh else HUB_PREFIX + name
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
    gpu = hardware(config.gpu, config.mfu, peak, link, DTYPE_NAMES[config.dtype])
    gigabytes = config.gpu_memory_gb or GPU_MEMORY_GB[config.gpu]
    return Cluster(config.gpus, gigabytes * GIB, config.gpus_per_node, gpu, config.reserve)


def _at_size(model: ModelConfig, config: PlanConfig) -> ModelConfig:
    """With the grid and vocabulary that were asked for."""
    if config.latent_shape is not None:
        model = model.at_grid(parse_latent_shape(config.latent_shape))
    if config.vocab_size is not None:
        model = dataclasses.replace(model, vocab_size=config.vocab_size)
    return model


def _plan_inference(config: PlanConfig) -> None:
    from cosmos_posttrain.plan import inference_report

    published = [name for name in PRESETS if not name.startswith("tiny")]
    names = published if config.model is None else [config.model]
    models = {name: _at_size(read_model(name)[0], config) for name in names}
    sizes: tuple[float, ...] = inference_report.GPU_SIZES
    if config.gpu_memory_gb is not None:
        sizes = (config.gpu_memory_gb,)
    inference_report.show(models, config.batch_size, sizes, config.json)


def main() -> int:
    """Plans and prints; returns the exit code."""
    description = "Plans a training run: parameters, memory per GPU, layouts that fit, speed."
    config = parse(PlanConfig, FLAGS, None, "python -m cosmos_posttrain.plan", description)
    validate(config)
    if config.inference:
        _plan_inference(config)
        return 0
    from cosmos_posttrain.plan import layouts, report
    from cosmos_posttrain.plan.memory import Workload

    name = config.model or DEFAULT_MODEL
    model, model_path = read_model(name)
    model = _at_size(model, config)
    model = dataclasses.replace(
        model,
        lora=lora_for(model, config.lora_rank, None, None),
        num_medusa_heads=config.num_medusa_heads,
    )
    work = Workload(
        model,
        config.micro_batch_size,
        config.global_batch_size,
        DTYPE_NAMES[config.dtype],
        config.distributed_optimizer,
        config.ema_decay is not None,
        config.num_medusa_heads > 0 and config.medusa_freeze_backbone,
        grad_reduce_in_bf16=config.grad_reduce_in_bf16,
        offload_fraction=config.offload_fraction,
    )
    cluster = _cluster(config)
    fitting, smallest = layouts.search(work, cluster)
    if not fitting:
        raise layouts.refusal(name, work, cluster, smallest)
    settings = report.Settings(model_path, config.ema_decay, config.async_save)
    plan = report.TrainingPlan(name, settings, work, cluster, fitting)
    if config.json:
        print(json.dumps(report.to_json(plan), indent=2))
    else:
        report.print_plan(plan, config.max_layouts)
    return 0


if __name__ == "__main__":
    run_cli(main)
