"""What ``--engine nemo`` cannot do, flag by flag. No torch, no NeMo.

Flows in: a run's config. Flows out: what is wrong with it for this engine, in words. A flag that is
not named here means the same under both engines.
"""

from __future__ import annotations

from typing import Any

from cosmos_posttrain.training.config import TrainConfig


def problems(config: TrainConfig) -> list[str]:
    """Names every setting that NeMo's trainer would ignore or break on."""
    model, parallel = config.model, config.parallel
    chunks = parallel.virtual_pipeline_model_parallel_size
    refused: dict[str, tuple[Any, str]] = {
        "--lora_rank": (model.lora_rank, "trains all weights"),
        "--medusa_num_heads": (model.num_medusa_heads or None, "trains no Medusa heads"),
        "--ema_decay": (config.optimizer.ema_decay, "keeps no average of the weights"),
        "--virtual_pipeline_model_parallel_size": (
            chunks if chunks > 1 else None,
            "does not interleave a pipeline",
        ),
        "--sample_every_n_steps": (config.samples.every_n_steps, "makes no samples"),
        "--profile_steps": (config.profile_steps, "profiles nothing"),
    }
    found = [
        f"{flag} {value} does not work with --engine nemo, which {what}"
        for flag, (value, what) in refused.items()
        if value is not None
    ]
    switches = {
        "--async_save": (config.async_save, "saves within the loop"),
        "--compile": (model.compile, "compiles nothing"),
        "--overlap_param_gather": (
            parallel.overlap_param_gather,
            "gathers weights after the update",
        ),
        "--optimizer_cpu_offload": (
            config.optimizer.cpu_offload,
            "keeps the optimizer beside the model",
        ),
    }
    found += [
        f"{flag} does not work with --engine nemo, which {what} (--no-{flag[2:]} takes it back)"
        for flag, (is_on, what) in switches.items()
        if is_on
    ]
    if found:
        found[-1] += ": leave it out, or use --engine direct"
    return found
