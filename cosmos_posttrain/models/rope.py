"""Rotary position embedding over time, height and width, with YaRN.

Flows in: a token grid. Flows out: the angle of every position and channel, in the half-rotation
convention that Megatron's ``apply_rotary_pos_emb`` expects (RoPE: Su et al., 2021,
arXiv:2104.09864; 3D RoPE: Cosmos World Foundation Model Platform, section 5.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import AxisScale, ModelConfig


def _inverse_frequencies(dim: int, base: float) -> Tensor:
    exponents = torch.arange(0, dim, 2, dtype=torch.float32)[: dim // 2] / dim
    return base**-exponents


def yarn_frequencies(
    frequencies: Tensor, original_length: int, scale: float, beta_fast: float, beta_slow: float
) -> Tensor:
    """Slows low frequencies down by ``scale`` and leaves high ones alone, with a ramp between.

    Args:
        frequencies: (D,) float32 inverse frequencies.
        original_length: positions along this axis in the original training.
        scale: interpolation factor.
        beta_fast: rotations over the original length above which a frequency stays.
        beta_slow: rotations below which it is divided by ``scale``.

    Returns:
        (D,) float32 (YaRN, arXiv:2309.00071, section 3.2).
    """
    high = 2 * math.pi * beta_fast / original_length
    low = 2 * math.pi * beta_slow / original_length
    keep = ((frequencies - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - keep) / scale + keep)


def rotary_angles(config: ModelConfig) -> Tensor:
    """Angles of every position of a sequence.

    Returns:
        (seq_length, kv_channels) float32 radians; the two halves of the last axis are equal. Zero
        for ``<bov>`` and for padding, which Video2World models have.
    """
    dim_space = config.kv_channels // 6 * 2
    dim_time = config.kv_channels - 2 * dim_space
    time = _inverse_frequencies(dim_time, config.rotary_base)
    space = _inverse_frequencies(dim_space, config.rotary_base)
    if config.yarn is not None:
        original, yarn = config.yarn.original_latent_shape, config.yarn
        settings = (yarn.scale, yarn.beta_fast, yarn.beta_slow)
        time = yarn_frequencies(time, original.time, *settings)
        space = yarn_frequencies(space, original.height, *settings)
    angles = _grid_angles(config.latent_shape, config.position_scale, time, space)
    if not config.is_video2world:
        return angles
    surplus = config.seq_length - config.num_clip_tokens
    return nn.functional.pad(angles, (0, 0, 1, surplus))


def _grid_angles(shape: LatentShape, scale: AxisScale, time: Tensor, space: Tensor) -> Tensor:
    axes = []
    for axis, (size, factor, frequencies) in enumerate(
        zip(shape, scale, (time, space, space), strict=True)
    ):
        positions = torch.arange(size, dtype=torch.float32) * factor
        angles = torch.outer(positions, frequencies)
        view = [1, 1, 1, angles.shape[1]]
        view[axis] = size
        axes.append(angles.view(view).expand(*shape, -1))
    half = torch.cat(axes, dim=-1).flatten(0, 2)
    return torch.cat([half, half], dim=-1)


class RotaryEmbedding3D(nn.Module):
    """Takes the place of Megatron's 1D rotary embedding in a ``GPTModel``.

    The table is computed once, in float32, and is never part of a checkpoint.
    """

    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("table", rotary_angles(config)[:, None, None, :], persistent=False)

    def get_rotary_seq_len(
        self,
        inference_context: object,
        decoder: Any,
        decoder_input: Tensor | None,
        config: TransformerConfig,
        *_args: object,
        **_kwargs: object,
    ) -> int:
        """Positions of the whole sequence; with a KV cache all, and attention takes its part."""
        if inference_context is not None:
            return self.table.shape[0]
        hidden = decoder_input if decoder.input_tensor is None else decoder.input_tensor
        assert hidden is not None
        split = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return hidden.shape[0] * split * config.context_parallel_size

    def forward(self, seq_len: int, **_kwargs: object) -> Tensor:
        """Angles (S, 1, 1, kv_channels) float32 of the positions that this rank works on."""
        if self.table.dtype != torch.float32:
            # Module.to(bfloat16) must not round angles of several hundred radians.
            raise RuntimeError("the rotary table must stay in float32; cast parameters only.")
        if parallel_state.get_context_parallel_world_size() == 1:
            return self.table[:seq_len]
        return self.table[:seq_len][context_parallel_positions(seq_len, self.table.device)]


def context_parallel_positions(seq_len: int, device: torch.device | str = "cpu") -> Tensor:
    """Positions of this context-parallel rank's tokens.

    Megatron's balanced split: the sequence is cut into 2 * CP chunks and rank r holds chunks r and
    2 * CP - 1 - r, so that causal attention costs every rank the same.

    Returns:
        (seq_len / CP,) int64.
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return torch.arange(seq_len, device=device)
    rank = parallel_state.get_context_parallel_rank()
    chunks = torch.arange(seq_len, device=device).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
