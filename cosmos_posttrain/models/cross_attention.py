"""Cross-attention of the Video2World models: video tokens ask, text embeddings answer.

Megatron's own has no grouped queries, no context of another width and no q/k norm. Flows in: hidden
states (S, B, hidden_size) and the text (L, B, context_dim). Flows out: (S, B, hidden_size). No
RoPE, no mask: every token sees every row of the text, those that pad it as well.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from cosmos_posttrain.models.sdpa import attend


@dataclass
class CrossAttentionSubmodules:
    """What a layer spec chooses: Megatron's linear layers and our norm, or Transformer Engine's."""

    linear_q: ModuleSpec | type
    linear_kv: ModuleSpec | type
    linear_proj: ModuleSpec | type
    q_layernorm: ModuleSpec | type
    k_layernorm: ModuleSpec | type


class CrossAttention(MegatronModule):
    """``linear_proj(softmax(q k^T / sqrt(d)) v)`` with q from the video and k, v from the text.

    Queries are grouped as in self-attention; q and k are normalised per head; ``linear_kv`` holds,
    for every group, its key and then its value. Tensor parallelism shares out the heads. The text
    is whole on every rank, whatever the sequence parallelism and context parallelism of the video.

    Args:
        config: Megatron's config.
        submodules: see ``CrossAttentionSubmodules``.
        layer_number: number of the layer in the whole model, from 1.
        context_dim: width of the text embeddings.
        pg_collection: process groups of the model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        context_dim: int,
        pg_collection: ProcessGroupCollection,
        **_kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        width, groups = config.kv_channels, config.num_query_groups
        assert width is not None and groups is not None
        self.layer_number = layer_number
        size = parallel_state.get_tensor_model_parallel_world_size()
        self.num_heads_on_rank = config.num_attention_heads // size
        self.num_groups_on_rank = groups // size
        common = {"bias": False, "is_expert": False, "tp_group": pg_collection.tp}
        column = {**common, "gather_output": False, "skip_bias_add": False}
        column["init_method"] = config.init_method
        queries = width * config.num_attention_heads
        self.linear_q = build_module(
            submodules.linear_q, config.hidden_size, queries, config=config, **column
        )
        whole = copy.copy(config)
        whole.sequence_parallel = False  # every rank has the whole text, nothing to gather
        self.linear_kv = build_module(
            submodules.linear_kv, context_dim, 2 * width * groups, config=whole, **column
        )
        self.linear_proj = build_module(
            submodules.linear_proj,
            queries,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **common,
        )
        norm = {"config": config, "hidden_size": width, "eps": config.layernorm_epsilon}
        self.q_layernorm = build_module(submodules.q_layernorm, **norm)
        self.k_layernorm = build_module(submodules.k_layernorm, **norm)

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends from every token to the whole text.

        Args:
            hidden_states: (S, B, hidden_size), this rank's part of the sequence.
            key_value_states: (L, B, context_dim); may be None once its keys are in the cache.
            inference_context: holds the KV cache.

        Returns:
            (S, B, hidden_size), and no bias.
        """
        query, _ = self.linear_q(hidden_states)
        query = self.q_layernorm(query.unflatten(-1, (self.num_heads_on_rank, -1)))
        key, value = self._cached_keys_and_values(key_value_states, inference_context)
        projected: tuple[Tensor, Tensor | None] = self.linear_proj(
            attend(query, key, value, causal=False)
        )
        return projected

    def _cached_keys_and_values(
        self, context: Tensor | None, inference_context: Any
    ) -> tuple[Tensor, Tensor]:
        """In inference, computed from the text once and kept beside the layer's own KV cache."""
        if inference_context is None:
            return self._keys_and_values(context)
        cache, name = (
            inference_context.key_value_memory_dict,
            f"cross_attention.{self.layer_number}",
        )
        if name not in cache:
            cache[name] = self._keys_and_values(context)
        key, value = cache[name]
        return key, value

    def _keys_and_values(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """(L, B, groups, kv_channels) each."""
        assert context is not None, "a Video2World model needs a text"
        # The text encoder is never trained. Without this, recomputation would compute gradients
        # for the text in every layer, and sum them over the tensor-parallel ranks.
        packed, _ = self.linear_kv(context.detach())
        key, value = packed.unflatten(-1, (self.num_groups_on_rank, 2, -1)).unbind(-2)
        return self.k_layernorm(key), value
