"""The model as a plain list of matrices, for decoding without a module call.

Flows in: an ``ARModel``. Flows out: logits of the next tokens, a few at a time, behind a cache of
keys and values that is written in place.

    tokens (B, N) --rows of the embedding--> (B * N, hidden)
        --layers: attention behind the cache, cross-attention, SwiGLU-->
        --norm, output rows--> logits (B, N, vocab_size)

The plan holds the model's own tensors, nothing is copied; Megatron's modules stay the oracle that
it is tested against. Under tensor parallelism each rank computes with its own part, as Megatron
does: rows of the embedding, heads, columns and rows of the MLP, rows of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from cosmos_posttrain.models.ar_model import ARModel


@dataclass(frozen=True)
class _CrossAttention:
    """Weights of one layer's cross-attention; ``kv`` (2 * groups * D, context_dim)."""

    norm: Tensor
    q: Tensor
    kv: Tensor
    out: Tensor
    q_norm: Tensor
    k_norm: Tensor


@dataclass(frozen=True)
class _Layer:
    """Weights of one layer, (out, in) each, this rank's part.

    Attributes:
        norm: before the attention, (hidden,).
        qkv: for every group its queries, its key and its value.
        out: behind the attention.
        q_norm: per head, (D,).
        k_norm: likewise.
        mlp_norm: before the MLP.
        gate_up: the gate, then what it multiplies.
        down: behind them.
        cross: of a Video2World model.
    """

    norm: Tensor
    qkv: Tensor
    out: Tensor
    q_norm: Tensor
    k_norm: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    cross: _CrossAttention | None


def _layer_of(weights: dict[str, Tensor]) -> _Layer:
    """A layer from Megatron's names, those of Transformer Engine's fused norms included."""

    def norm(own: str, fused: str) -> Tensor:
        name = f"{own}.weight"
        return weights[name] if name in weights else weights[f"{fused}.layer_norm_weight"]

    cross = None
    if "cross_attention.linear_q.weight" in weights:
        cross = _CrossAttention(
            weights["pre_cross_attn_layernorm.weight"],
            weights["cross_attention.linear_q.weight"],
            weights["cross_attention.linear_kv.weight"],
            weights["cross_attention.linear_proj.weight"],
            weights["cross_attention.q_layernorm.weight"],
            weights["cross_attention.k_layernorm.weight"],
        )
    return _Layer(
        norm("input_layernorm", "self_attention.linear_qkv"),
        weights["self_attention.linear_qkv.weight"],
        weights["self_attention.linear_proj.weight"],
        weights["self_attention.q_layernorm.weight"],
        weights["self_attention.k_layernorm.weight"],
        norm("pre_mlp_layernorm", "mlp.linear_fc1"),
        weights["mlp.linear_fc1.weight"],
        weights["mlp.linear_fc2.weight"],
        cross,
    )


class DecodePlan:
    """A model's weights, laid out for decoding.

    Args:
        model: stays as it is; the plan sees what training changes in place.

    Attributes:
        config: the model's numbers.
        device: where the weights are.
        dtype: of the weights.
    """

    def __init__(self, model: ARModel) -> None:
        module = model.module
        self.config = config = model.config
        self.device = model.device
        self.eps = config.layernorm_epsilon
        self._size = parallel_state.get_tensor_model_parallel_world_size()
        self._group = parallel_state.get_tensor_model_parallel_group()
        self.embedding = module.embedding.word_embeddings.weight.detach()
        self.dtype = self.embedding.dtype
        self._first_row = parallel_state.get_tensor_model_parallel_rank() * len(self.embedding)
        self.layers = [
            _layer_of({name: p.detach() for name, p in layer.named_parameters()})
            for layer in module.decoder.layers
        ]
        self.final_norm = module.decoder.final_layernorm.weight.detach()
        self.output = module.output_layer.weight.detach()
        self.groups = config.num_query_groups // self._size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.width = config.kv_channels
        # (S, 1, D): cosines, and sines that are negative in the first half.
        cosines, sines = module.rotary_pos_emb.table.to(self.dtype).unbind()
        self.cosines, self.sines = cosines[:, 0], sines[:, 0]
        self.positions = None
        if config.is_video2world:
            self.positions = module.decoder.layers[0].positions.table[:, 0].to(self.dtype)

    def reduce(self, x: Tensor) -> Tensor:
        """Sums the ranks' parts, in place."""
        if self._size > 1:
            torch.distributed.all_reduce(x, group=self._group)
        return x

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding: (B, N) to (B, N, hidden)."""
        if self._size == 1:
            return F.embedding(tokens, self.embedding)
        own = tokens - self._first_row
        elsewhere = (own < 0) | (own >= len(self.embedding))
        rows = F.embedding(own.masked_fill(elsewhere, 0), self.embedding)
        return self.reduce(rows.masked_fill_(elsewhere[..., None], 0))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, from all ranks: (B, N, hidden) to (B, N, vocab_size) float32."""
        scores = F.linear(self.normed(hidden, self.final_norm), self.output)
        if self._size > 1:
            parts = [torch.empty_like(scores) for _ in range(self._size)]
            torch.distributed.all_gather(parts, scores.contiguous(), group=self._group)
            scores = torch.cat(parts, -1)
        return scores[..., : self.config.vocab_size].float()

    def keys_and_values(self, layer: _Layer, context: Tensor) -> tuple[Tensor, Tensor]:
        """Of a text (B, L, context_dim) in one layer, (B, groups, L, D) each."""
        assert layer.cross is not None
        packed = F.linear(context, layer.cross.kv).unflatten(-1, (self.groups, 2, self.width))
        key, value = packed.unbind(-2)
        key = self.normed(key, layer.cross.k_norm)
        return key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of the last axis."""
        return F.rms_norm(x, weight.shape, weight, self.eps)


class DecodeState:
    """The cache of some clips that are decoded together, and the forward pass on it.

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
        shape = (len(plan.layers), 2, batch_size, plan.groups, max_length, plan.width)
        self._cache = torch.empty(shape, dtype=plan.dtype, device=plan.device)
        self._texts: list[tuple[Tensor, Tensor]] = []
        if context is not None:
            context = context.to(plan.device, plan.dtype)
            self._texts = [plan.keys_and_values(layer, context) for layer in plan.layers]
        self.length = 0

    def feed(self, tokens: Tensor, num_scores: int = 1) -> Tensor:
        """Feeds tokens behind those in the cache.

        Args:
            tokens: (B, N) int64, the next N tokens.
            num_scores: of so many of the last of them scores are wanted.

        Returns:
            (B, num_scores, vocab_size) float32.
        """
        plan, start = self.plan, self.length
        end = start + tokens.shape[1]
        x = plan.embed(tokens)
        rows = plan.cosines[start:end], plan.sines[start:end]
        for number, layer in enumerate(plan.layers):
            if plan.positions is not None:
                x = x + plan.positions[start:end]
            x = x + self._attention(number, layer, x, rows, start, end)
            if layer.cross is not None:
                x = x + self._cross_attention(number, layer.cross, x)
            gate, up = F.linear(plan.normed(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x = x + plan.reduce(F.linear(F.silu(gate) * up, layer.down))
        self.length = end
        return plan.logits(x[:, -num_scores:])

    def _attention(
        self,
        number: int,
        layer: _Layer,
        x: Tensor,
        rows: tuple[Tensor, Tensor],
        start: int,
        end: int,
    ) -> Tensor:
        plan = self.plan
        batch, count, _ = x.shape
        shape = (batch, count, plan.groups, plan.heads_per_group + 2, plan.width)
        packed = F.linear(plan.normed(x, layer.norm), layer.qkv).view(shape)
        query = plan.normed(packed[..., :-2, :].flatten(2, 3), layer.q_norm)
        key = plan.normed(packed[..., -2, :], layer.k_norm)
        keys, values = self._cache[number]
        keys[:, :, start:end] = _rotated(key, *rows).transpose(1, 2)
        values[:, :, start:end] = packed[..., -1, :].transpose(1, 2)
        attended = _attend(
            _rotated(query, *rows), keys[:, :, :end], values[:, :, :end], plan.groups, causal=True
        )
        return plan.reduce(F.linear(attended, layer.out))

    def _cross_attention(self, number: int, layer: _CrossAttention, x: Tensor) -> Tensor:
        plan = self.plan
        query = F.linear(plan.normed(x, layer.norm), layer.q).unflatten(-1, (-1, plan.width))
        keys, values = self._texts[number]
        attended = _attend(
            plan.normed(query, layer.q_norm), keys, values, plan.groups, causal=False
        )
        return plan.reduce(F.linear(attended, layer.out))


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """(B, N, heads, D) turned by the rows (N, 1, D) of the table."""
    return torch.addcmul(x * cosines, x.roll(x.shape[-1] // 2, -1), sines)


def _attend(query: Tensor, keys: Tensor, values: Tensor, groups: int, *, causal: bool) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` of a few queries, the last ones of the keys' positions.

    Args:
        query: (B, N, heads, D).
        keys: (B, groups, S, D).
        values: as ``keys``.
        groups: of heads that share keys.
        causal: hide from each query what comes after it.

    Returns:
        (B, N, heads * D).
    """
    batch, count, heads, width = query.shape
    length = keys.shape[2]
    per_group = heads // groups
    if count == 1 and not query.is_cuda:
        grouped = query.view(batch, groups, per_group, width)
        scores = (grouped * width**-0.5) @ keys.transpose(-1, -2)
        return (scores.softmax(-1) @ values).view(batch, 1, heads * width)
    mask = None
    if causal and 1 < count < length:
        mask = torch.ones(count, length, dtype=torch.bool, device=query.device).tril(length - count)
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        keys,
        values,
        attn_mask=mask,
        is_causal=causal and 1 < count == length,
        enable_gqa=per_group > 1,
    )
    return output.transpose(1, 2).reshape(batch, count, heads * width)
