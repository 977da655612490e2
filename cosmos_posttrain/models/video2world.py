"""A layer of the Video2World models: absolute positions before it, cross-attention in it.

``x + positions``, then ``x + self_attention(norm(x))``, ``x + cross_attention(norm(x))`` and
``x + mlp(norm(x))``; Megatron's layer has places for all but the first.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from cosmos_posttrain.models.absolute_positions import AbsolutePositions


class Video2WorldLayer(TransformerLayer):
    """Megatron's layer, on hidden states to which the positions were added.

    Args:
        config: Megatron's config.
        *args: of Megatron's layer.
        positions: the model's table; all layers share it.
        **kwargs: of Megatron's layer.
    """

    def __init__(
        self, config: TransformerConfig, *args: Any, positions: AbsolutePositions, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, **kwargs)
        self.positions = positions

    def forward(
        self, hidden_states: Tensor, *args: Any, inference_context: Any = None, **kwargs: Any
    ) -> Any:
        """Adds the positions, before the residual is taken; see Megatron's ``forward``."""
        start = 0 if inference_context is None else inference_context.sequence_len_offset
        hidden_states = self.positions(hidden_states, self.config, start)
        return super().forward(hidden_states, *args, inference_context=inference_context, **kwargs)
