"""Layer specs: which modules a transformer layer is made of.

``torch`` (the default) runs everywhere: SDPA attention, our RMSNorm, Megatron's parallel linear
layers. ``te`` uses Transformer Engine and needs a GPU. Both have the same names on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.absolute_positions import AbsolutePositions
from cosmos_posttrain.models.attention import (
    CachedSelfAttention,
    RotatedSelfAttention,
    SDPACoreAttention,
)
from cosmos_posttrain.models.config import LAYER_SPECS, ModelConfig
from cosmos_posttrain.models.cross_attention import CrossAttention, CrossAttentionSubmodules
from cosmos_posttrain.models.lora import with_factors
from cosmos_posttrain.models.lora_config import ROW_PARALLEL, LoraConfig
from cosmos_posttrain.models.norm import RMSNorm
from cosmos_posttrain.models.swiglu import GatedColumnLinear, SwiGLUMLP
from cosmos_posttrain.models.video2world import Video2WorldLayer

# Transformer Engine fuses a norm into the linear layer behind it and names it after that layer.
# On disk the fused names are used, by both specs.
NAMES_ON_DISK = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def _torch_linear(lora: LoraConfig | None, name: str) -> type:
    base = RowParallelLinear if name in ROW_PARALLEL else ColumnParallelLinear
    return with_factors(GatedColumnLinear if name == "linear_fc1" else base, lora, name)


def _mlp(linear: Callable[[str], type]) -> Any:
    submodules = MLPSubmodules(linear_fc1=linear("linear_fc1"), linear_fc2=linear("linear_fc2"))
    if hasattr(SwiGLUMLP, "as_mlp_submodule"):  # from megatron-core 0.18 on
        return partial(SwiGLUMLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=SwiGLUMLP, submodules=submodules)


def _torch_layer(lora: LoraConfig | None) -> ModuleSpec:
    linear = partial(_torch_linear, lora)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=CachedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linear("linear_qkv"),
                    core_attention=SDPACoreAttention,
                    linear_proj=linear("linear_proj"),
                    q_layernorm=RMSNorm,
                    k_layernorm=RMSNorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_mlp(linear),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=NAMES_ON_DISK,
        ),
    )


def _with_text(
    layer: ModuleSpec,
    model: ModelConfig,
    positions: AbsolutePositions,
    linear: Callable[[str], type],
    norm: type,
) -> ModuleSpec:
    """A base layer's spec with what a Video2World layer has on top of it.

    The attention in it is always SDPA: Transformer Engine's would pass keys and values around the
    context-parallel ring, but every rank has the whole text.
    """
    cross_attention = ModuleSpec(
        module=CrossAttention,
        params={"context_dim": model.context_dim},
        submodules=CrossAttentionSubmodules(
            linear_q=linear("linear_q"),
            linear_kv=linear("linear_kv"),
            linear_proj=linear("linear_proj"),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return ModuleSpec(
        module=Video2WorldLayer,
        params={"positions": positions},
        submodules=dataclasses.replace(
            layer.submodules,
            pre_cross_attn_layernorm=norm,
            cross_attention=cross_attention,
            cross_attn_bda=get_bias_dropout_add,
        ),
    )


def _torch_block(model: ModelConfig, num_layers: int) -> TransformerBlockSubmodules:
    layer = _torch_layer(model.lora)
    if model.is_video2world:
        linear = partial(_torch_linear, model.lora)
        layer = _with_text(layer, model, AbsolutePositions(model), linear, RMSNorm)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def _te_block(model: ModelConfig, num_layers: int) -> TransformerBlockSubmodules:
    if model.lora is not None:
        raise ConfigError(
            "--layer_spec te computes a norm and the linear layer behind it in one, so that "
            "LoRA's factors cannot be put beside the linear layer; use --layer_spec torch with "
            "--lora_rank."
        )
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--layer_spec te needs Transformer Engine, which is not installed; use --layer_spec "
            "torch, or an NVIDIA PyTorch container."
        ) from error
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    layer.submodules.self_attention.module = RotatedSelfAttention
    if model.is_video2world:

        def linear(name: str) -> type:
            return TERowParallelLinear if name in ROW_PARALLEL else TEColumnParallelLinear

        layer = _with_text(layer, model, AbsolutePositions(model), linear, TENorm)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)


def block_spec(name: str, model: ModelConfig, num_layers: int) -> TransformerBlockSubmodules:
    """The transformer block's modules.

    Args:
        name: ``torch`` or ``te``.
        model: the model's numbers.
        num_layers: layers on this pipeline stage.

    Raises:
        ConfigError: an unknown name, or ``te`` with LoRA or without Transformer Engine.
    """
    if name == "torch":
        return _torch_block(model, num_layers)
    if name == "te":
        return _te_block(model, num_layers)
    raise ConfigError(f"there is no layer spec {name!r}; use one of {', '.join(LAYER_SPECS)}.")
