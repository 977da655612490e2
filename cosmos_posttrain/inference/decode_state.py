"""The forward pass of a decode plan behind a cache of keys and values that is written in place.

Flows in: tokens (B, N), the next ones of some clips. Flows out: scores of what follows them.

    tokens (B, N) --rows of the embedding--> (B * N, hidden)
        --layers: attention behind the cache, cross-attention, SwiGLU-->
        --norm, output rows--> logits (B, N, vocab_size)

Clips may stand at different places: each is then written, turned and masked at its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_posttrain.inference.decode_plan import (
    CrossAttentionWeights,
    DecodePlan,
    LayerWeights,
)


@dataclass(frozen=True)
class Places:
    """Where the tokens of one pass stand.

    Attributes:
        start: of the first of each clip, where that is the same for all; else -1.
        end: the cache is filled up to here, or less.
        numbers: (B, N) int64, of clips that stand at different places; else None.
        cosines: (N, 1, 1, D) or (B, N, 1, 1, D).
        sines: likewise.
        mask: added to the last scores of attention, (N, N), or to all, (B, 1, 1, N, end); None
            where nothing is hidden.
    """

    start: int
    end: int
    numbers: Tensor | None
    cosines: Tensor
    sines: Tensor
    mask: Tensor | None


class DecodeState:
    """Some clips that are decoded together; see ``NextScores``.

    Args:
        plan: the model.
        batch_size: clips.
        max_length: positions that the cache holds.
        context: (B, L, context_dim) of a Video2World model.

    Attributes:
        length: positions that are filled.
    """

    def __init__(
        self,
        plan: DecodePlan,
        batch_size: int,
        max_length: int,
        context: Tensor | None = None,
    ) -> None:
        self.plan = plan
        shape = (len(plan.layers), batch_size, plan.groups, max_length, plan.width)
        # Zeros: what is hidden by a mask is multiplied by nothing, and must be a number.
        self._values = torch.zeros(shape, dtype=plan.dtype, device=plan.device)
        self._keys = torch.zeros_like(self._values)
        if not self._keys.is_cuda:  # as the product of queries and keys is fastest there
            self._keys = self._keys.view(*shape[:-2], plan.width, max_length).transpose(-1, -2)
        self._rows = torch.arange(batch_size, device=plan.device)[:, None]
        self._texts: list[tuple[Tensor, Tensor]] = []
        if context is not None:
            context = context.to(plan.device, plan.dtype)
            self._texts = [
                plan.keys_and_values(layer.cross, context)
                for layer in plan.layers
                if layer.cross is not None
            ]
        self._scored = self._values.new_empty(0)  # hidden states behind which was scored last
        self.length = 0

    def feed(self, tokens: Tensor, num_scores: int = 1, starts: list[int] | None = None) -> Tensor:
        """See ``NextScores``."""
        count = tokens.shape[1]
        if starts is None:
            places = self._common_places(count)
            self.length = places.end
        else:
            firsts = torch.tensor(starts, device=self.plan.device)[:, None]
            places = self._places_at(firsts, count, max(starts) + count)
        return self._run(tokens, places, num_scores)

    def _run(self, tokens: Tensor, places: Places, num_scores: int) -> Tensor:
        plan = self.plan
        batch, count = tokens.shape
        x = plan.embed(tokens.flatten())
        for number, layer in enumerate(plan.layers):
            if plan.positions is not None:
                x = x + self._absolute(plan.positions, places, batch)
            x = self._attention(number, layer, x, (batch, count), places)
            if layer.cross is not None:
                x = self._cross_attention(number, layer.cross, x, batch)
            gate, up = F.linear(plan.normed(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = plan.added(x, F.silu(gate, inplace=True).mul_(up), layer.down)
        if num_scores < count:
            x = x.view(batch, count, -1)[:, -num_scores:].flatten(0, 1)
        self._scored = x.view(batch, num_scores, -1)
        return plan.logits(x).view(batch, num_scores, -1)

    def head_scores(self, rows: Tensor) -> Tensor:
        """Scores of the model's Medusa heads.

        Args:
            rows: (B,) int64, one of the places that were scored last for each clip.

        Returns:
            (B, N, vocab_size): head k's of what stands k places behind the token scored there.
        """
        return self.plan.head_logits(self._scored[self._rows[:, 0], rows])

    def _common_places(self, count: int) -> Places:
        plan, start = self.plan, self.length
        end = start + count
        mask = None
        if start > 0 and count > 1:
            mask = torch.full((count, count), -torch.inf, device=plan.device).triu_(1)
        cosines, sines = (table[start:end, None, None] for table in (plan.cosines, plan.sines))
        return Places(start, end, None, cosines, sines, mask)

    def _places_at(self, firsts: Tensor, count: int, end: int) -> Places:
        """Places of ``count`` tokens of each clip behind its first (B, 1), all before ``end``."""
        plan = self.plan
        numbers = firsts + torch.arange(count, device=plan.device)
        # A clip that is complete goes on beyond its end; nobody looks at what follows there.
        rows = numbers.clamp(max=len(plan.cosines) - 1)
        cosines, sines = (table[rows][:, :, None, None] for table in (plan.cosines, plan.sines))
        hidden = torch.arange(end, device=plan.device) > numbers[..., None]
        mask = torch.zeros(hidden.shape, device=plan.device).masked_fill_(hidden, -torch.inf)
        return Places(-1, end, numbers, cosines, sines, mask[:, None, None])

    def _absolute(self, table: Tensor, places: Places, batch: int) -> Tensor:
        """Absolute positions, (B * N, hidden)."""
        if places.numbers is None:
            rows = table[places.start : places.end]
            return rows if batch == 1 else rows.repeat(batch, 1)
        return table[places.numbers.clamp(max=len(table) - 1)].flatten(0, 1)

    def _attention(
        self, number: int, layer: LayerWeights, x: Tensor, size: tuple[int, int], places: Places
    ) -> Tensor:
        plan = self.plan
        shape = (*size, plan.groups, plan.heads_per_group + 2, plan.width)
        packed = F.linear(plan.normed(x, layer.norm), layer.qkv).view(shape)
        turned = plan.normed(packed[..., :-1, :], layer.qk_norm)
        swapped = turned.roll(plan.width // 2, -1)
        turned = turned.mul_(places.cosines).addcmul_(swapped, places.sines)
        query, key, value = turned[..., :-1, :], turned[..., -1, :], packed[..., -1, :]
        return plan.added(x, self._attended(number, query, key, value, places), layer.out)

    def _attended(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, places: Places
    ) -> Tensor:
        """Takes keys and values (B, N, groups, D) into a layer's cache; see ``_attend``."""
        keys, values = self._keys[number], self._values[number]
        if places.numbers is None:
            keys[:, :, places.start : places.end] = key.transpose(1, 2)
            values[:, :, places.start : places.end] = value.transpose(1, 2)
        else:
            keys[self._rows, :, places.numbers] = key
            values[self._rows, :, places.numbers] = value
        return _attend(query, keys[:, :, : places.end], values[:, :, : places.end], places.mask)

    def _cross_attention(
        self, number: int, weights: CrossAttentionWeights, x: Tensor, batch: int
    ) -> Tensor:
        plan = self.plan
        shape = (batch, -1, plan.groups, plan.heads_per_group, plan.width)
        query = F.linear(plan.normed(x, weights.norm), weights.q).view(shape)
        query = plan.normed(query, weights.q_norm)
        return plan.added(x, _attend(query, *self._texts[number], None, False), weights.out)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, is_causal: bool = True
) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v``.

    Args:
        query: (B, N, groups, heads, D), the heads of a group share its keys.
        keys: (B, groups, S, D).
        values: as ``keys``.
        mask: see ``Places``.
        is_causal: without a mask, N > 1 queries are the first N of N positions, and each sees
            those up to its own.

    Returns:
        (B * N, groups * heads * D).
    """
    batch, count, groups, heads, width = query.shape
    if mask is None and count > 1:
        found = F.scaled_dot_product_attention(
            query.flatten(2, 3).transpose(1, 2),
            keys.contiguous(),
            values,
            is_causal=is_causal,
            enable_gqa=True,
        )
        return found.transpose(1, 2).reshape(batch * count, groups * heads * width)
    # Rows of a group's heads below each other: no key is repeated for them.
    grouped = query.permute(0, 2, 3, 1, 4).reshape(batch, groups, heads * count, width)
    attend = _attend_by_kernel if query.is_cuda else _attend_by_products
    found = attend(grouped, keys, values, mask).view(batch, groups, heads, count, width)
    return found.permute(0, 3, 1, 2, 4).reshape(batch * count, groups * heads * width)


def _attend_by_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """For the CPU, where few rows are fastest so: query (B, groups, heads * N, D)."""
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if mask is not None:
        rows = scores.view(*scores.shape[:2], -1, mask.shape[-2], scores.shape[-1])
        hidden = rows[..., scores.shape[-1] - mask.shape[-1] :]
        hidden += mask.to(scores.dtype)
    return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values


def _attend_by_kernel(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """For the GPU: one kernel; arguments as above."""
    if mask is not None:
        mask = F.pad(mask, (keys.shape[2] - mask.shape[-1], 0)).to(query.dtype)
        mask = mask.view(-1, 1, *mask.shape[-2:])
        mask = mask.repeat(1, 1, query.shape[2] // mask.shape[2], 1)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
