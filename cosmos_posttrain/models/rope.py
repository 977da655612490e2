"""Rotary position embedding over time, height and width, with YaRN.

Flows in: a token grid. Flows out: cosines and sines of every position and channel, made once for
all layers, and queries and keys turned by them (RoPE: Su et al., 2021, arXiv:2104.09864; 3D RoPE:
Cosmos World Foundation Model Platform, section 5.2). Halves of a head are paired, as in Megatron.
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


def rotary_table(config: ModelConfig) -> Tensor:
    """Cosines and sines of every position, as ``rotate`` takes them.

    Returns:
        (2, seq_length, 1, 1, kv_channels) float32: the cosines; the sines, negative in the first
        half, which is where the second half of a vector is subtracted.
    """
    angles = rotary_angles(config)
    sines = angles.sin()
    sines[:, : angles.shape[1] // 2].neg_()
    return torch.stack([angles.cos(), sines])[:, :, None, None, :]


def rotate(x: Tensor, rows: Tensor) -> Tensor:
    """Turns each pair of channels (i, i + D / 2) by its position's angle.

    Args:
        x: (S, B, heads, D) queries or keys.
        rows: (2, S, 1, 1, D), the part of ``rotary_table`` for these positions.

    Returns:
        (S, B, heads, D), in the dtype of ``x``.
    """
    cosines, sines = rows.to(x.dtype)
    return _Rotation.apply(x, cosines, sines)


def swap_halves(x: Tensor) -> Tensor:
    """(..., D) -> (..., D), its second half first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second, first], dim=-1)


class _Rotation(torch.autograd.Function):
    """One step of autograd, which keeps nothing but views of the table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return x * cosines + swap_halves(x) * sines

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        # Attention's gradients lie (B, heads, S, D); how sums over them round depends on the order.
        grad = grads[0].contiguous()
        return grad * cosines + swap_halves(grad * sines), None, None


class RotaryEmbedding3D(nn.Module):
    """Takes the place of Megatron's 1D rotary embedding in a ``GPTModel``.

    What it gives goes through Megatron's block to ``RotatedSelfAttention`` in place of the angles.
    The table is computed once, in float32, and is never part of a checkpoint. It may be cast with
    the parameters: cosines and sines are rounded then, never angles of several hundred radians.
    """

    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("table", rotary_table(config), persistent=False)

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
            return self.table.shape[1]
        hidden = decoder_input if decoder.input_tensor is None else decoder.input_tensor
        assert hidden is not None
        split = config.tensor_model_parallel_size if config.sequence_parallel else 1
        return hidden.shape[0] * split * config.context_parallel_size

    def forward(self, seq_len: int, **_kwargs: object) -> Tensor:
        """Rows (2, S, 1, 1, kv_channels) of the positions that this rank works on."""
        rows = self.table[:, :seq_len]
        if parallel_state.get_context_parallel_world_size() == 1:
            return rows
        return rows[:, context_parallel_positions(seq_len, rows.device)]


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
