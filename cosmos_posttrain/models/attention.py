"""Self-attention: RoPE for both layer specs; for ``torch``, SDPA and a KV cache, on CPU and GPU.

Flows in: Megatron's queries, keys and values (S, B, heads, head_dim). Flows out: the attention's
output (S, B, heads * head_dim). Context parallelism gathers keys and values over its group.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from cosmos_posttrain.models.heads import rotated_heads
from cosmos_posttrain.models.rope import context_parallel_positions, rotate
from cosmos_posttrain.models.sdpa import attend


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
    """Attention by ``attend``, over the whole sequence where context parallelism splits it."""

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
            query: (S, B, heads, head_dim), this context-parallel rank's part.
            key: (S_k, B, groups, head_dim), S_k >= S; of this rank, too.
            value: as ``key``.
            attention_mask: must be None; the mask follows from the positions.
            attn_mask_type: ``no_mask`` attends everywhere.

        Returns:
            (S, B, heads * head_dim).
        """
        assert attention_mask is None, "clips are never masked"
        causal = attn_mask_type != AttnMaskType.no_mask
        if parallel_state.get_context_parallel_world_size() == 1:
            return attend(query, key, value, causal=causal)
        key, value = _GatherSequence.apply(key), _GatherSequence.apply(value)
        if not causal:
            return attend(query, key, value, causal=False)
        return _attend_from_both_chunks(query, key, value)


def _attend_from_both_chunks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention from this rank's two chunks, each to the keys up to its own end.

    Queries at the end of a prefix of the keys are what fused kernels take without a mask.

    Args:
        query: (S / CP, B, heads, head_dim): chunks r and 2 * CP - 1 - r of rank r.
        key: (S, B, groups, head_dim), in the sequence's order.
        value: as ``key``.
    """
    length = query.shape[0] // 2
    size = parallel_state.get_context_parallel_world_size()
    rank = parallel_state.get_context_parallel_rank()
    outputs = []
    for chunk, number in zip(query.chunk(2), (rank, 2 * size - 1 - rank), strict=True):
        end = (number + 1) * length
        outputs.append(attend(chunk, key[:end], value[:end], causal=True))
    return torch.cat(outputs)


class RotatedSelfAttention(SelfAttention):
    """Megatron's self-attention, with RoPE from a table that was made once for all layers.

    Megatron's own would compute cosines and sines in every layer, of queries and again of keys, and
    its static cache stores keys before RoPE and rotates all of them again for every new token.
    Rotating once, before they are stored, gives the same numbers.
    """

    def _adjust_key_value_for_inference(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Megatron calls it in training too; None in place of a table means: is rotated already."""
        table, _ = rotary_pos_emb
        start = 0 if inference_context is None else inference_context.sequence_len_offset
        rows = table[:, start : start + query.shape[0]]
        return self._stored(
            inference_context, rotate(query, rows), rotate(key, rows), value, *args, **kwargs
        )

    def _stored(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """All keys and values so far, by Megatron's static cache."""
        return super()._adjust_key_value_for_inference(
            inference_context, query, key, value, None, *args, **kwargs
        )


class CachedSelfAttention(RotatedSelfAttention):
    """With a cache that asks nothing about its device, and leaves the mask to the positions."""

    def forward(
        self, hidden_states: Tensor, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As Megatron's; in training the norms and the rotation are one step.

        Args:
            hidden_states: (S, B, hidden_size), this rank's part of the sequence.
            *args: of Megatron's.
            rotary_pos_emb: (2, S, 1, 1, D), see ``rope.rotary_table``.
            **kwargs: of Megatron's.

        Returns:
            (S, B, hidden_size), and no bias.
        """
        output: tuple[Tensor, Tensor | None]
        if not self.training or self.checkpoint_core_attention:
            output = super().forward(hidden_states, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
            return output
        packed, _ = self.linear_qkv(hidden_states)
        norms = self.q_layernorm, self.k_layernorm
        query, key, value = rotated_heads(
            packed,
            norms[0].weight,
            norms[1].weight,
            rotary_pos_emb,
            self.num_query_groups_per_partition,
            norms[0].eps,
        )
        attended = self.core_attention(query, key, value, None, self.attn_mask_type)
        output = self.linear_proj(attended)
        return output

    def _stored(
        self,
        inference_context: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_args: Any,
        **_kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, None, AttnMaskType, None]:
        if inference_context is None:
            return query, key, value, None, self.attn_mask_type, None
        start = inference_context.sequence_len_offset
        end = start + key.shape[0]
        cache = inference_context.key_value_memory_dict
        if self.layer_number not in cache:
            shape = (inference_context.max_sequence_length, *key.shape[1:])
            cache[self.layer_number] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = cache[self.layer_number]
        keys[start:end] = key
        values[start:end] = value
        return query, keys[:end], values[:end], None, self.attn_mask_type, None
