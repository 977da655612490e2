"""Layer specs: which modules a transformer layer is made of.

``torch`` (the default) runs everywhere: SDPA attention, our RMSNorm, Megatron's parallel linear
layers. ``te`` uses Transformer Engine and needs a GPU. Both have the same names on disk.
"""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.attention import CachedSelfAttention, SDPACoreAttention
from cosmos_posttrain.models.norm import RMSNorm

LAYER_SPECS = ("torch", "te")

# Transformer Engine fuses a norm into the linear layer behind it and names it after that layer.
# On disk the fused names are used, by both specs.
NAMES_ON_DISK = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def _torch_layer() -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=CachedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SDPACoreAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=RMSNorm,
                    k_layernorm=RMSNorm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=NAMES_ON_DISK,
        ),
    )


def _te_block(num_layers: int) -> TransformerBlockSubmodules:
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--layer_spec te needs Transformer Engine, which is not installed; use --layer_spec "
            "torch, or an NVIDIA PyTorch container."
        ) from error
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_with_transformer_engine_spec,
    )

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)


def block_spec(name: str, num_layers: int) -> TransformerBlockSubmodules:
    """The transformer block's modules.

    Args:
        name: ``torch`` or ``te``.
        num_layers: layers on this pipeline stage.

    Raises:
        ConfigError: an unknown name, or ``te`` without Transformer Engine.
    """
    if name == "torch":
        return TransformerBlockSubmodules(
            layer_specs=[_torch_layer()] * num_layers, layer_norm=RMSNorm
        )
    if name == "te":
        return _te_block(num_layers)
    raise ConfigError(f"there is no layer spec {name!r}; use one of {', '.join(LAYER_SPECS)}.")
