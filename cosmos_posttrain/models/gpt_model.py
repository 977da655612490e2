"""The Megatron models themselves: base, and Video2World.

Flows in: tokens (B, S), and for Video2World a text (B, L, context_dim). Flows out: logits over the
vocabulary, split over the tensor-parallel ranks, or the loss of every token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.medusa import MEDUSA, SHARE, MedusaHead, head_losses, head_weights
from cosmos_posttrain.models.rope import RotaryEmbedding3D
from cosmos_posttrain.models.token_losses import token_losses


class CosmosGPTModel(GPTModel):
    """Megatron's GPT model with the Cosmos 3D RoPE and a vocabulary of any size.

    Attributes:
        z_loss_coefficient: of the z-loss whose gradient training adds to the loss's; the value of
            the loss stays the cross-entropy.
        medusa_heads: on the last stage of a model that has some; else None.
    """

    post_process: bool
    z_loss_coefficient: float = 0.0

    def __init__(self, model_config: ModelConfig, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.model_config = model_config
        self.rotary_pos_emb = RotaryEmbedding3D(model_config)
        self.medusa_heads: nn.ModuleList | None = None
        if self.post_process and model_config.num_medusa_heads:
            count = model_config.num_medusa_heads
            self.medusa_heads = nn.ModuleList(MedusaHead(config) for _ in range(count))
        self._trains_heads_alone = False

    def train_heads_alone(self) -> None:
        """Freezes all but the Medusa heads; the loss is theirs then, their weighted mean."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(MEDUSA))
        self._trains_heads_alone = True

    @property
    def trains_heads_alone(self) -> bool:
        """Whether the loss is that of the Medusa heads alone."""
        return self._trains_heads_alone

    @contextlib.contextmanager
    def hidden_states_only(self) -> Iterator[None]:
        """While it lasts, the last stage gives (S, B, H) behind the last norm, and no logits."""
        before, self.post_process = self.post_process, False
        try:
            yield
        finally:
            self.post_process = before

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As Megatron's, with a loss that never holds the logits of all positions.

        Args:
            input_ids: (B, S) int64.
            position_ids: None; positions follow from the grid.
            attention_mask: None; attention is causal.
            labels: (B, S) int64; with them the last stage gives losses; in training with Medusa
                heads, theirs are in them.
            **kwargs: of Megatron's.

        Returns:
            Losses (B, S) float32 in nats; without labels logits (B, S, V / TP), whose columns that
            only pad the vocabulary mean nothing; before the last stage hidden states.
        """
        inputs = (input_ids, position_ids, attention_mask)
        if labels is None or not self.post_process:
            output: Tensor = super().forward(*inputs, **kwargs)
            return output
        alone = self._trains_heads_alone
        keeps_graph = torch.is_grad_enabled() and not alone
        with self.hidden_states_only(), torch.set_grad_enabled(keeps_graph):
            hidden: Tensor = super().forward(*inputs, **kwargs)
        of_all = (
            *(self.output_layer.weight, labels, self.model_config.vocab_size),
            self.config.sequence_parallel,
        )
        heads = self.medusa_heads if self.training or alone else None
        if heads is not None and alone:
            return head_losses(heads, hidden, *of_all) / sum(head_weights(len(heads)))
        losses = token_losses(hidden, *of_all, self.z_loss_coefficient if self.training else 0.0)
        return losses if heads is None else losses + SHARE * head_losses(heads, hidden, *of_all)


class Video2WorldModel(CosmosGPTModel):
    """The model with a text: fewer tokens can be predicted than can be fed.

    The absolute positions and the cross-attention are in its layers (``video2world.py``).
    """

    def __init__(self, model_config: ModelConfig, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(model_config, config, **kwargs)
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                model_config.padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=not self.parallel_output,
                tp_group=self.pg_collection.tp,
            )
            self.setup_embeddings_and_output_layer()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        context: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """As Megatron's, with a text.

        The text goes through Megatron's blocks as an argument of every layer, so that a
        recomputation sees the text of its own micro-batch under any pipeline schedule.

        Args:
            input_ids: (B, S) int64, ``<bov>`` first.
            position_ids: None; positions follow from the grid.
            attention_mask: None; attention is causal.
            context: (B, L, context_dim) text embeddings; None only behind a KV cache that has seen
                them.
            **kwargs: of Megatron's ``GPTModel.forward``.
        """
        if context is not None:
            context = context.to(self.config.params_dtype).transpose(0, 1).contiguous()
        output: Tensor = super().forward(
            input_ids,
            position_ids,
            attention_mask,
            extra_block_kwargs={"context": context},
            **kwargs,
        )
        return output
