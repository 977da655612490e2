"""Attention by torch's fused kernels, which never hold the scores.

Flows in: queries (S, B, heads, D) and keys and values (S_k, B, groups, D), in Megatron's layout.
Flows out: (S, B, heads * D).

Which kernel it is on a GPU: flash attention in bfloat16 and float16, which takes grouped queries as
they are and can hide what lies above the lower right diagonal. It knows no float32; the
memory-efficient kernel does, but takes no groups, so keys and values are repeated for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v``.

    Args:
        query: (S, B, heads, D).
        key: (S_k, B, groups, D); each group of keys serves heads / groups heads.
        value: as ``key``.
        causal: the queries are the last S of S_k positions, and none sees a later one. Otherwise
            all see all.

    Returns:
        (S, B, heads * D).
    """
    length, batch_size, heads, _ = query.shape
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    if query.is_cuda and length > 1:
        key, value = _repeated_where_needed(query, key, value)
    square = length == key.shape[2]
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=_lower_right(query, key) if causal and length > 1 and not square else None,
        is_causal=causal and length > 1 and square,
        enable_gqa=heads != key.shape[1],
    )
    return output.permute(2, 0, 1, 3).reshape(length, batch_size, -1)


def _repeated_where_needed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (B, heads or groups, S_k, D) such that a fused kernel takes them.

    Without this, torch would fall back to the kernel that writes all scores to memory.
    """
    groups = key.shape[1]
    if groups == query.shape[1]:
        return key, value
    if can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True)):
        return key, value
    heads_per_group = query.shape[1] // groups
    return key.repeat_interleave(heads_per_group, 1), value.repeat_interleave(heads_per_group, 1)


def _lower_right(query: Tensor, key: Tensor) -> Tensor:
    """Hides from query i all keys after i + S_k - S.

    On a GPU it only tells the kernel so (torch reserves host memory for a matrix, and never touches
    it); on the CPU it is a boolean matrix (S, S_k), whose kernel holds no scores either.
    """
    length, seen = query.shape[2], key.shape[2]
    if query.is_cuda:
        return causal_lower_right(length, seen)
    return torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
