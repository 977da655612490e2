"""The DV network rewritten for inference: the same function in fewer operations.

Flows in: a :class:`DVNetwork`. Flows out: a copy that shares its parameters but for those of the
layers below, which are folded once, in float64, with the linear maps beside them:

- the wavelet transform into the encoder's first and the decoder's last convolution;
- downsampling: average pools and the closing 1x1x1 into the strided convolutions;
- upsampling: "repeat every pixel, convolve, add, 1x1x1" into one small convolution per output
  phase. A 3x3 window over repeated pixels covers 2x2 different ones, so a doubling of the frame
  takes 16 products for each input pixel in place of 40.

Nothing here is trained or saved: names and values of the published parameters stay in the network.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_posttrain.tokenizer.haar import from_blocks, to_blocks
from cosmos_posttrain.tokenizer.layers import (
    HybridDownsample,
    HybridUpsample,
    SpatialConv,
    StreamCache,
    TemporalConv,
    prepend_past,
)
from cosmos_posttrain.tokenizer.network import DVNetwork


def fold(network: DVNetwork) -> DVNetwork:
    """A float32 network that computes what ``network`` does, up to rounding.

    Args:
        network: in float32; sums of weights and ones would lose their digits in bfloat16.

    Returns:
        A network for ``latents``, ``encode``, ``decode_codes`` and ``decode``, without gradients.
    """
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    fast = copy.deepcopy(network, shared)
    with torch.no_grad():
        _fold_wavelets(fast)
        for level in (*fast.encoder.down, *fast.decoder.up):
            for name, layer in list(level.named_children()):
                if isinstance(layer, HybridDownsample) and (layer.spatial or layer.temporal):
                    setattr(level, name, FoldedDownsample(layer))
                elif isinstance(layer, HybridUpsample) and (layer.spatial or layer.temporal):
                    setattr(level, name, FoldedUpsample(layer))
    fast.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    return fast


def _parameters(conv: nn.Module | Tensor) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias in float64."""
    assert isinstance(conv, nn.Conv3d) and conv.bias is not None
    return conv.weight.double(), conv.bias.double()


def _conv(weight: Tensor, bias: Tensor) -> nn.Conv3d:
    """A convolution with these values, in float32."""
    shape = (weight.shape[2], weight.shape[3], weight.shape[4])
    conv = nn.Conv3d(weight.shape[1], weight.shape[0], shape, device="meta")
    conv.weight = nn.Parameter(weight.float(), requires_grad=False)
    conv.bias = nn.Parameter(bias.float(), requires_grad=False)
    return conv


def _pointwise(layer: nn.Module, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution (O, I, ...) followed by the 1x1x1 ``layer``."""
    outer, outer_bias = _parameters(layer.conv3d)
    matrix = outer.flatten(1)
    return torch.einsum("po,o...->p...", matrix, weight), matrix @ bias + outer_bias


class _Patcher(nn.Module):
    """Pixels -> blocks, channels (colour, pixel)."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, video: Tensor, is_first: bool = True) -> Tensor:
        return to_blocks(video, self.patch_size, is_first).flatten(4)


class _Unpatcher(nn.Module):
    """Blocks -> pixels."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, blocks: Tensor, is_first: bool = True) -> Tensor:
        return from_blocks(blocks.unflatten(4, (-1, self.patch_size**3)), self.patch_size, is_first)


def _fold_wavelets(network: DVNetwork) -> None:
    """Lets the outermost convolutions work on pixels: the transform of a block is linear."""
    encoder, decoder = network.encoder, network.decoder
    first, last = encoder.conv_in[0], decoder.conv_out[1]
    size = network.config.patch_size**3
    weight, bias = _parameters(first.conv3d)
    bands = weight.unflatten(1, (size, -1))
    forward = encoder.patcher3d.matrix.double()
    weight = torch.einsum("obcthw,bp->ocpthw", bands, forward).flatten(1, 2)
    first.conv3d = _conv(weight, bias)
    weight, bias = _parameters(last.conv3d)
    backward = decoder.unpatcher3d.matrix.double()
    weight = torch.einsum("pb,bc...->cp...", backward, weight.unflatten(0, (size, -1)))
    bias = torch.einsum("pb,bc->cp", backward, bias.unflatten(0, (size, -1)))
    last.conv3d = _conv(weight.flatten(0, 1), bias.flatten())
    encoder.patcher3d = _Patcher(network.config.patch_size)  # type: ignore[assignment]
    decoder.unpatcher3d = _Unpatcher(network.config.patch_size)  # type: ignore[assignment]


class FoldedDownsample(nn.Module):
    """:class:`HybridDownsample` as one strided convolution each for space and time."""

    def __init__(self, layer: HybridDownsample) -> None:
        super().__init__()
        channels = layer.conv3.conv3d.in_channels
        one = torch.eye(channels, dtype=torch.float64, device=layer.conv3.conv3d.weight.device)
        self.spatial = self.temporal = None
        if layer.spatial:
            weight, bias = _parameters(layer.conv1.conv3d)
            weight[:, :, 0, :2, :2] += one[:, :, None, None] / 4
            if not layer.temporal:
                weight, bias = _pointwise(layer.conv3, weight, bias)
            self.spatial = SpatialConv(channels, channels, stride=2)
            self.spatial.conv3d = _conv(weight, bias)
        if layer.temporal:
            weight, bias = _parameters(layer.conv2.conv3d)
            weight[:, :, 1:, 0, 0] += one[:, :, None] / 2
            weight, bias = _pointwise(layer.conv3, weight, bias)
            self.temporal = TemporalConv(channels, channels, stride=2)
            self.temporal.conv3d = _conv(weight, bias)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        if self.spatial is not None:
            x = self.spatial(x)
        if self.temporal is not None:
            x = self.temporal.apply_kernel(prepend_past(self, x, 2, 1, cache))
        return x


class FoldedUpsample(nn.Module):
    """:class:`HybridUpsample` on the small input: one kernel for each output phase."""

    def __init__(self, layer: HybridUpsample) -> None:
        super().__init__()
        channels = layer.conv3.conv3d.in_channels
        one = torch.eye(channels, dtype=torch.float64, device=layer.conv3.conv3d.weight.device)
        self.spatial = self.temporal = None
        if layer.temporal:
            kernel, bias = _parameters(layer.conv1.conv3d)
            kernel[:, :, 2, 0, 0] += one
            if not layer.spatial:
                kernel, bias = _pointwise(layer.conv3, kernel, bias)
            old, mid, new = kernel[:, :, :, 0, 0].unbind(2)
            # Rows: first and second copy of a frame; columns: the frame before it, and itself.
            phases = ((old + mid, new), (old, mid + new))
            weight = torch.cat([torch.stack(taps, 2) for taps in phases])[..., None, None]
            self.temporal = TemporalConv(channels, 2 * channels)
            self.temporal.conv3d = _conv(weight, bias.repeat(2))
        if layer.spatial:
            kernel, bias = _parameters(layer.conv2.conv3d)
            kernel[:, :, 0, 1, 1] += one
            kernel, bias = _pointwise(layer.conv3, kernel, bias)
            rows = _fold_repeated(kernel[:, :, 0], 2)
            weight = torch.cat([phase for row in rows for phase in _fold_repeated(row, 3)])
            self.spatial = _conv(weight[:, :, None], bias.repeat(4))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        if self.temporal is not None:
            is_first = cache is None or cache.is_first
            both = self.temporal.apply_kernel(prepend_past(self, x, 1, 1, cache))
            x = both.unflatten(4, (2, -1)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)
            x = x[:, 1:] if is_first else x
        return x if self.spatial is None else self._double(x, self.spatial)

    @staticmethod
    def _double(x: Tensor, conv: nn.Conv3d) -> Tensor:
        """(B, T, H, W, C) -> (B, T, 2 * H, 2 * W, C)."""
        b, t, h, w, _ = x.shape
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        # Entry (i, j) has seen rows i - 1 and i, columns j - 1 and j.
        out = F.conv2d(frames, conv.weight.squeeze(2), conv.bias, padding=1)
        phases = out.permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))
        doubled = phases.new_empty(b * t, h, 2, w, 2, phases.shape[-1])
        for i in range(2):
            for j in range(2):
                doubled[:, :, i, :, j] = phases[:, i : i + h, j : j + w, i, j]
        return doubled.reshape(b, t, 2 * h, 2 * w, -1)


def _fold_repeated(kernel: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Splits 3 taps over a repeated axis into 2 taps for its even and 2 for its odd outputs."""
    old, mid, new = kernel.unbind(axis)
    return torch.stack([old, mid + new], axis), torch.stack([old + mid, new], axis)
