"""Builds a Megatron model from a ``ModelConfig``.

Flows in: the model's numbers, a layer spec, and the process groups that exist. Flows out: this
rank's part of a ``CosmosGPTModel`` on this rank's device.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch.nn.functional import silu

from cosmos_posttrain import launch
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.gpt_model import CosmosGPTModel, Video2WorldModel
from cosmos_posttrain.models.lora_start import freeze_base, start_factors
from cosmos_posttrain.models.specs import block_spec

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def transformer_config(
    model: ModelConfig, *, dtype: torch.dtype, sequence_parallel: bool = False, **overrides: Any
) -> TransformerConfig:
    """Megatron's config of this model under the process groups that exist.

    Args:
        model: the model's numbers.
        dtype: dtype of parameters and activations.
        sequence_parallel: split activations between the tensor-parallel layers along the sequence.
        **overrides: any other field of Megatron's ``TransformerConfig`` (recomputation, say).
    """
    on_gpu = torch.cuda.is_available()
    values: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "ffn_hidden_size": model.ffn_hidden_size,
        "layernorm_epsilon": model.layernorm_epsilon,
        "normalization": "RMSNorm",
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "sequence_parallel": sequence_parallel,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        # On the CPU every rank draws the whole weight and keeps its part: the initial weights do
        # not depend on the tensor parallel size.
        "use_cpu_initialization": not on_gpu,
        "bias_dropout_fusion": on_gpu,
        "bias_activation_fusion": on_gpu,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "batch_p2p_comm": on_gpu,
    }
    return TransformerConfig(**(values | overrides))


def build_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    layer_spec: str = "torch",
    sequence_parallel: bool = False,
    seed: int = 1234,
    device: str | None = None,
    chunk: int | None = None,
    **overrides: Any,
) -> CosmosGPTModel:
    """Builds this rank's part of the model, with seeded fresh weights.

    Args:
        model: the model's numbers.
        dtype: dtype of the parameters; None means the model's own on a GPU and float32 on the CPU.
        layer_spec: ``torch`` or ``te``.
        sequence_parallel: see ``transformer_config``.
        seed: of the fresh weights.
        device: ``meta`` builds a model without weights, to be counted; ``cpu`` leaves it there on a
            machine with a GPU too; None means this process's.
        chunk: which of this rank's parts, where the pipeline is interleaved; else None.
        **overrides: fields of Megatron's ``TransformerConfig``.

    Raises:
        ConfigError: parallel sizes that do not divide the model, or LoRA where it cannot work.
    """
    model.check_tensor_parallel(parallel_state.get_tensor_model_parallel_world_size())
    model.check_pipeline_parallel(
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
    )
    if dtype is None:
        dtype = DTYPES.get(model.params_dtype) if torch.cuda.is_available() else None
        dtype = dtype or torch.float32
    if device == "cpu":
        overrides["use_cpu_initialization"] = True
    config = transformer_config(
        model, dtype=dtype, sequence_parallel=sequence_parallel, **overrides
    )
    groups.set_seed(seed + 10_000 * (chunk or 0))
    if device == "meta":
        config.perform_initialization = False
        with torch.device("meta"), cpu_device():
            return _construct(model, config, layer_spec, chunk)
    with cpu_device():
        module = _construct(model, config, layer_spec, chunk)
    if model.lora is not None:
        start_factors(module, seed)
    return module.to(device=device or launch.device(), dtype=dtype)


def _construct(
    model: ModelConfig, config: TransformerConfig, layer_spec: str, chunk: int | None
) -> CosmosGPTModel:
    kind = Video2WorldModel if model.is_video2world else CosmosGPTModel
    num_parts = config.pipeline_model_parallel_size
    num_parts *= config.virtual_pipeline_model_parallel_size or 1
    module = kind(
        model,
        config=config,
        transformer_layer_spec=block_spec(layer_spec, model, model.num_layers // num_parts),
        vocab_size=model.padded_input_vocab_size,
        max_sequence_length=model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        vp_stage=chunk,
        parallel_output=True,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )
    if model.lora is not None:
        freeze_base(module)
    return module
