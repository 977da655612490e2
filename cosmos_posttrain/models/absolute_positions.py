"""The fixed absolute position embedding of the Video2World models.

Flows in: a token grid. Flows out: one table of sines and cosines that every layer adds to its
input, each rank the rows of its own positions.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import AxisScale, ModelConfig
from cosmos_posttrain.models.rope import context_parallel_positions


def _sines_and_cosines(size: int, dim: int, scale: float) -> Tensor:
    """(size, dim) float64: ``sin(p w_i)``, then ``cos(p w_i)``, with ``w_i = 10000^(-2i/dim)``."""
    exponents = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    positions = torch.arange(size, dtype=torch.float64) * scale
    angles = torch.outer(positions, 10000.0**-exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sine_cosine_table(shape: LatentShape, hidden_size: int, scale: AxisScale) -> Tensor:
    """The embedding of every position of a grid (Vaswani et al., 2017, section 3.5, per axis).

    Height and width take ``hidden_size // 6 * 2`` channels each and time the rest, in the order
    time, height, width. Computed in float64 and rounded to bfloat16, as the weights were trained.

    Returns:
        (T * H * W, hidden_size) bfloat16.
    """
    dim_space = hidden_size // 6 * 2
    dims = (hidden_size - 2 * dim_space, dim_space, dim_space)
    axes = []
    for axis, (size, dim, factor) in enumerate(zip(shape, dims, scale, strict=True)):
        view = [1, 1, 1, dim]
        view[axis] = size
        values = _sines_and_cosines(size, dim, factor).to(torch.bfloat16)
        axes.append(values.view(view).expand(*shape, -1))
    return torch.cat(axes, dim=-1).flatten(0, 2)


class AbsolutePositions(nn.Module):
    """The table of one model, shared by all its layers and never part of a checkpoint.

    Its first row (``<bov>``) and the rows behind the clip (padding) are zero.
    """

    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rows = sine_cosine_table(config.latent_shape, config.hidden_size, config.position_scale)
        surplus = config.seq_length - config.num_clip_tokens
        table = nn.functional.pad(rows, (0, 0, 1, surplus))
        self.register_buffer("table", table[:, None], persistent=False)

    def forward(self, hidden_states: Tensor, config: TransformerConfig, start: int) -> Tensor:
        """Adds to each position its row.

        Args:
            hidden_states: (S, B, hidden_size), this rank's part of the sequence.
            config: says how sequences are split over ranks.
            start: position of the first token; above 0 behind a KV cache only.

        Returns:
            (S, B, hidden_size).
        """
        length = hidden_states.shape[0]
        if config.context_parallel_size > 1:
            rows = self._rows_of_context_rank(length, config)
        else:
            if config.sequence_parallel:
                start += length * parallel_state.get_tensor_model_parallel_rank()
            rows = self.table[start : start + length]
        return hidden_states + rows

    def _rows_of_context_rank(self, length: int, config: TransformerConfig) -> Tensor:
        split = config.tensor_model_parallel_size if config.sequence_parallel else 1
        total = length * split * config.context_parallel_size
        positions = context_parallel_positions(total, self.table.device)
        if split > 1:
            # Sequence parallelism cuts what context parallelism has left of the sequence.
            positions = positions.chunk(split)[parallel_state.get_tensor_model_parallel_rank()]
        return self.table[positions]
