"""This rank's part of the model, with Megatron's gradient buffers.

Flows in: a run's config and the model's numbers. Flows out: the module, or several where a pipeline
is interleaved, wrapped for data parallelism.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from cosmos_posttrain import launch
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.builder import CosmosGPTModel, build_model
from cosmos_posttrain.models.chunks import ModelChunks, chunks_of
from cosmos_posttrain.models.compiling import compile_models
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.gradients import fuse_weight_gradients, skip_exchange_with_oneself


def check_division(
    model: ModelConfig,
    sizes: groups.Parallelism,
    sequence_parallel: bool,
    world_size: int | None = None,
) -> None:
    """Refuses sizes that do not divide the model or a clip, before Megatron's groups exist.

    Raises:
        ConfigError: names the sizes.
    """
    model.check_tensor_parallel(sizes.tensor)
    model.check_pipeline_parallel(sizes.pipeline, sizes.virtual_pipeline)
    groups.check_world(sizes, world_size)
    pieces = (sizes.tensor if sequence_parallel else 1) * (
        2 * sizes.context if sizes.context > 1 else 1
    )
    if model.seq_length % pieces:
        raise ConfigError(
            f"a sequence of {model.seq_length} tokens cannot be cut into {pieces} equal pieces for "
            "sequence and context parallelism; choose smaller sizes."
        )


def training_dtype(config: TrainConfig) -> torch.dtype:
    """The config's dtype, or this machine's usual one.

    Raises:
        ConfigError: gradients are to be kept in less than it.
    """
    usual = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    dtype = launch.parse_dtype(config.model.dtype) or usual
    if config.optimizer.grad_reduce_in_bf16 and dtype != torch.bfloat16:
        raise ConfigError(
            f"--grad_reduce_in_bf16 keeps the gradients of a model in bfloat16, but this one is in "
            f"{str(dtype).removeprefix('torch.')}; give --dtype bfloat16, or leave it out."
        )
    return dtype


def build(
    config: TrainConfig, model: ModelConfig, dtype: torch.dtype
) -> CosmosGPTModel | ModelChunks:
    """This rank's part of the model, or its parts, with fresh weights.

    Raises:
        ConfigError: ``--compile``, where nothing can.
    """
    compile_models(config.model.compile)
    count = config.parallel.virtual_pipeline_model_parallel_size
    if count == 1:
        return _build(config, model, dtype, None)
    return ModelChunks([_build(config, model, dtype, number) for number in range(count)])


def _build(
    config: TrainConfig, model: ModelConfig, dtype: torch.dtype, chunk: int | None
) -> CosmosGPTModel:
    recompute: dict[str, Any] = {}
    if config.model.recompute:
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif config.model.recompute_modules is not None:
        recompute = {
            "recompute_granularity": "selective",
            "recompute_modules": [config.model.recompute_modules],
        }
    module = build_model(
        model,
        dtype=dtype,
        layer_spec=config.model.layer_spec,
        sequence_parallel=config.parallel.sequence_parallel,
        seed=config.model.seed,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fuse_weight_gradients(),
        chunk=chunk,
        deterministic_mode=config.deterministic_mode,
        **recompute,
    )
    module.z_loss_coefficient = config.z_loss_coefficient
    if model.num_medusa_heads and config.model.medusa_freeze_backbone:
        module.train_heads_alone()
    return module


def wrap(
    model: CosmosGPTModel | ModelChunks,
    gradients_in_fp32: bool = True,
    overlap_param_gather: bool = False,
) -> DistributedDataParallel | ModelChunks:
    """The model with Megatron's gradient buffers; on a GPU they are summed behind the backward.

    Args:
        model: of this rank.
        gradients_in_fp32: whatever the model's dtype; else they are in that.
        overlap_param_gather: see ``ParallelConfig``, and ``gather_parameters``.
    """
    chunks = chunks_of(model)
    wrapped = [
        _wrap(chunk, gradients_in_fp32, overlap_param_gather, chunk is chunks[0])
        for chunk in chunks
    ]
    return wrapped[0] if len(wrapped) == 1 else ModelChunks(wrapped)


def _wrap(
    model: CosmosGPTModel, in_fp32: bool, overlap_param_gather: bool, is_first: bool
) -> DistributedDataParallel:
    num_ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    overlap_param_gather = overlap_param_gather and num_ranks > 1
    with cpu_device():
        ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=in_fp32,
                use_distributed_optimizer=True,
                overlap_grad_reduce=overlap_param_gather
                or (torch.cuda.is_available() and num_ranks > 1),
                overlap_param_gather=overlap_param_gather,
            ),
            model,
            # The other parts are done with before: their exchange hides behind the first one.
            disable_bucketing=not is_first,
        )
    skip_exchange_with_oneself(ddp)
    if overlap_param_gather:
        _wait_for_all_parameters(ddp)
    return ddp


def _wait_for_all_parameters(ddp: DistributedDataParallel) -> None:
    """Before a layer begins, all of its parameters are there, and behind the last one all others.

    Megatron waits for those of a module when that is called; some of ours are used without it
    (the norms of queries and keys, LoRA's factors, the output layer in the loss).
    """
    model: CosmosGPTModel = ddp.module

    def wait_for(parameters: list[torch.nn.Parameter]) -> Callable[..., None]:
        buffered = [p for p in parameters if p in ddp.param_to_bucket_group]

        def wait(*_args: Any) -> None:
            for parameter in buffered:
                ddp.param_to_bucket_group[parameter].finish_param_sync()

        return wait

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(wait_for(list(layer.parameters())))
    if model.post_process:
        in_layers = {id(p) for layer in model.decoder.layers for p in layer.parameters()}
        others = [p for p in model.parameters() if id(p) not in in_layers]
        model.decoder.final_layernorm.register_forward_pre_hook(wait_for(others))


def gather_parameters(ddp: DistributedDataParallel | ModelChunks) -> None:
    """Gives every rank all updated weights of its model, to read them without calling the model.

    They come by themselves with a forward pass, also one of a validation; a checkpoint is made of
    what each rank updates itself.
    """
    for chunk in chunks_of(ddp):
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
