"""Attention for the ``torch`` layer spec: SDPA, on CPU and GPU, in training and with a KV cache.

Flows in: Megatron's queries, keys and values (S, B, heads, head_dim). Flows out: the attention's
output (S, B, heads * head_dim). Context parallelism gathers keys and values over its group.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from cosmos_posttrain.models.rope import context_parallel_positions


class _GatherSequence(torch.autograd.Function):
    """All-gather along the sequence over the context-parallel group; backward sums and slices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=group)
        ctx.group = group
        return _to_sequence_order(torch.cat(parts))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous().clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad[context_parallel_positions(grad.shape[0], grad.device)]


def _to_sequence_order(gathered: Tensor) -> Tensor:
    """Undoes the balanced split: rank r's part holds chunks r and 2 * CP - 1 - r."""
    size = parallel_state.get_context_parallel_world_size()
    chunks = gathered.chunk(2 * size)
    first, second = chunks[0::2], chunks[1::2]
    return torch.cat([*first, *reversed(second)])


class SDPACoreAttention(nn.Module):
    """``softmax(q k^T / sqrt(d)) v`` by ``torch.nn.functional.scaled_dot_product_attention``."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_kwargs: Any) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        **_kwargs: Any,
    ) -> Tensor:
        """Attends causally; queries are the last positions where there are fewer of them.

        Args:
            query: (S, B, heads, head_dim).
            key: (S_k, B, groups, head_dim), S_k >= S.
            value: as ``key``.
            attention_mask: must be None; the mask follows from the positions.
            attn_mask_type: ``no_mask`` attends everywhere.

        Returns:
            (S, B, heads * head_dim).
        """
        assert attention_mask is None, "clips are never masked"
        causal = attn_mask_type != AttnMaskType.no_mask
        mask = None
        if parallel_state.get_context_parallel_world_size() > 1:
            key, value = _GatherSequence.apply(key), _GatherSequence.apply(value)
            if causal:
                positions = context_parallel_positions(key.shape[0], query.device)
                mask = positions[:, None] >= torch.arange(key.shape[0], device=query.device)
        elif causal and 1 < query.shape[0] < key.shape[0]:
            mask = torch.ones(
                query.shape[0], key.shape[0], dtype=torch.bool, device=query.device
            ).tril(key.shape[0] - query.shape[0])
        output = scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=causal and mask is None and query.shape[0] > 1,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


class CachedSelfAttention(SelfAttention):
    """Megatron's self-attention with a KV cache that holds rotated keys.

    Megatron's static cache stores keys before RoPE and rotates all of them again for every new
    token. Rotating once, before they are stored, gives the same numbers.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Any, AttnMaskType, None]:
        if inference_context is None:
            return query, key, value, rotary_pos_emb, self.attn_mask_type, None
        start = inference_context.sequence_len_offset
        end = start + key.shape[0]
        angles, _ = rotary_pos_emb
        angles = angles[start:end]
        query = apply_rotary_pos_emb(query, angles, config=self.config)
        key = apply_rotary_pos_emb(key, angles, config=self.config)
        cache = inference_context.key_value_memory_dict
        if self.layer_number not in cache:
            shape = (inference_context.max_sequence_length, *key.shape[1:])
            cache[self.layer_number] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = cache[self.layer_number]
        keys[start:end] = key
        values[start:end] = value
        return query, keys[:end], values[:end], None, self.attn_mask_type, None
