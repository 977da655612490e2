"""The model as a plain list of matrices, for decoding without a module call.

Flows in: an ``ARModel``. Flows out: its matrices and what every layer does with them; a
``DecodeState`` runs through them.

The plan holds the model's own matrices, nothing is copied; Megatron's modules stay the oracle that
it is tested against. Under tensor parallelism each rank computes with its own part, as Megatron
does: rows of the embedding, heads, columns and rows of the MLP, rows of the output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.medusa import ahead


@dataclass(frozen=True)
class CrossAttentionWeights:
    """Of one layer, (out, in) each; ``kv`` for every group its key and its value."""

    norm: Tensor
    q: Tensor
    kv: Tensor
    out: Tensor
    q_norm: Tensor
    k_norm: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """Of one layer, (out, in) each, this rank's part.

    Attributes:
        norm: before the attention, (hidden,).
        qkv: for every group its queries, its key and its value.
        out: behind the attention.
        qk_norm: of the heads of a group and its key, (heads + 1, D).
        mlp_norm: before the MLP.
        gate_up: the gate, then what it multiplies.
        down: behind them.
        cross: of a Video2World model.
    """

    norm: Tensor
    qkv: Tensor
    out: Tensor
    qk_norm: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    cross: CrossAttentionWeights | None


def _layer_of(weights: dict[str, Tensor], heads_per_group: int) -> LayerWeights:
    """A layer from Megatron's names, those of Transformer Engine's fused norms included."""

    def norm(own: str, fused: str) -> Tensor:
        name = f"{own}.weight"
        return weights[name] if name in weights else weights[f"{fused}.layer_norm_weight"]

    cross = None
    if "cross_attention.linear_q.weight" in weights:
        cross = CrossAttentionWeights(
            weights["pre_cross_attn_layernorm.weight"],
            weights["cross_attention.linear_q.weight"],
            weights["cross_attention.linear_kv.weight"],
            weights["cross_attention.linear_proj.weight"],
            weights["cross_attention.q_layernorm.weight"],
            weights["cross_attention.k_layernorm.weight"],
        )
    return LayerWeights(
        norm("input_layernorm", "self_attention.linear_qkv"),
        weights["self_attention.linear_qkv.weight"],
        weights["self_attention.linear_proj.weight"],
        torch.stack(
            [weights["self_attention.q_layernorm.weight"]] * heads_per_group
            + [weights["self_attention.k_layernorm.weight"]]
        ),
        norm("pre_mlp_layernorm", "mlp.linear_fc1"),
        weights["mlp.linear_fc1.weight"],
        weights["mlp.linear_fc2.weight"],
        cross,
    )


class DecodePlan:
    """A model's weights, laid out for decoding.

    Args:
        model: stays as it is; the plan sees what training changes in place. Nothing here is for
            gradients: run it where none are kept.

    Attributes:
        config: the model's numbers.
        device: where the weights are.
        dtype: of the weights.
    """

    def __init__(self, model: ARModel) -> None:
        module = model.module
        self.config = config = model.config
        self.device = model.device
        self._size = parallel_state.get_tensor_model_parallel_world_size()
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._eps = config.layernorm_epsilon
        self._floors: dict[int, Tensor] = {}
        self.embedding = module.embedding.word_embeddings.weight
        self.dtype = self.embedding.dtype
        self._first_row = parallel_state.get_tensor_model_parallel_rank() * len(self.embedding)
        self.groups = config.num_query_groups // self._size
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
        self.width = config.kv_channels
        self.layers = [
            _layer_of(dict(layer.named_parameters()), self.heads_per_group)
            for layer in module.decoder.layers
        ]
        self._final_norm = module.decoder.final_layernorm.weight
        self._output = module.output_layer.weight
        self._heads = [head.weight for head in module.medusa_heads or ()]
        # (S, D): cosines, and sines that are negative in the first half.
        cosines, sines = module.rotary_pos_emb.table.to(self.dtype).flatten(1, 3).unbind()
        self.cosines, self.sines = cosines, sines
        self.positions: Tensor | None = None
        if config.is_video2world:
            self.positions = module.decoder.layers[0].positions.table[:, 0].to(self.dtype)

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding: (M,) to (M, hidden)."""
        if self._size == 1:
            return F.embedding(tokens, self.embedding)
        own = tokens - self._first_row
        elsewhere = (own < 0) | (own >= len(self.embedding))
        rows = F.embedding(own.masked_fill(elsewhere, 0), self.embedding)
        return self._reduced(rows.masked_fill_(elsewhere[:, None], 0))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, from all ranks: (M, hidden) to (M, vocab_size)."""
        return self._scores(self.normed(hidden, self._final_norm))

    def head_logits(self, hidden: Tensor) -> Tensor:
        """Scores of the N Medusa heads: (M, hidden) to (M, N, vocab_size)."""
        x = self.normed(hidden, self._final_norm)
        rows = torch.stack([ahead(x, weight) for weight in self._heads], 1)
        return self._scores(rows.flatten(0, 1)).view(*rows.shape[:2], -1)

    def _scores(self, x: Tensor) -> Tensor:
        scores = F.linear(x, self._output)
        if self._size > 1:
            parts = [torch.empty_like(scores) for _ in range(self._size)]
            torch.distributed.all_gather(parts, scores, group=self._group)
            scores = torch.cat(parts, -1)
        return scores[:, : self.config.vocab_size]

    def keys_and_values(
        self, weights: CrossAttentionWeights, text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of a text (B, L, context_dim) in one layer, (B, groups, L, D) each."""
        packed = F.linear(text, weights.kv).unflatten(-1, (self.groups, 2, self.width))
        key, value = packed.unbind(-2)
        key = self.normed(key, weights.k_norm)
        return key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous()

    def normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of the last axis; on the CPU in few operations, torch's own is six there."""
        if x.dtype != torch.float32 or x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], None, self._eps) * weight
        width = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        # x / sqrt(sum(x^2) / width + eps)
        return (x / torch.hypot(norm, self._floor(width))).mul_(weight).mul_(width**0.5)

    def _floor(self, width: int) -> Tensor:
        if width not in self._floors:
            self._floors[width] = torch.tensor((width * self._eps) ** 0.5, device=self.device)
        return self._floors[width]

    def added(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """``x + y @ weight.T``, of which each rank has a part: (M, hidden)."""
        if self._size == 1 and type(weight) is nn.Parameter:  # not torchao's
            return torch.addmm(x, y, weight.t())
        return x + self._reduced(F.linear(y, weight))

    def _reduced(self, x: Tensor) -> Tensor:
        """Sums the ranks' parts, in place."""
        if self._size > 1:
            torch.distributed.all_reduce(x, group=self._group)
        return x


def lay_out(model: ARModel) -> None:
    """Stores the model's matrices by column, in place: on a CPU, one row is multiplied faster so.

    Shapes and values stay, and one matrix at a time is held twice. For a model that nothing else
    computes with: its strides are another's than a training step's.
    """
    if model.device.type != "cpu":
        return
    embedding = model.module.embedding.word_embeddings.weight
    for parameter in model.module.parameters():
        is_plain = type(parameter) is nn.Parameter  # not torchao's
        if is_plain and parameter.ndim == 2 and parameter is not embedding:
            parameter.data = parameter.data.t().contiguous().t()
