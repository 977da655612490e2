"""Building blocks of the DV network.

Flows in and out: activations (B, T, H, W, C), channels last, so that every 2D view of them that a
convolution or a matrix product needs is free. Convolutions over space and over time are separate
(1x3x3 then 3x1x1), and everything is causal in time: frame t depends on frames <= t only.

A clip may come in chunks: the layers that look back in time keep what they need of the past in a
:class:`StreamCache`. Parameter names follow the published checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StreamCache:
    """What each temporal layer remembers between two chunks of one clip."""

    def __init__(self) -> None:
        self._tensors: dict[nn.Module, Tensor] = {}
        self._started = False

    @property
    def is_first(self) -> bool:
        """True until :meth:`end_chunk`: the chunk holds the clip's first frame."""
        return not self._started

    def end_chunk(self) -> None:
        """Marks the first chunk as done."""
        self._started = True

    def get(self, layer: nn.Module) -> Tensor | None:
        """The layer's past, None in the first chunk."""
        return self._tensors.get(layer)

    def put(self, layer: nn.Module, past: Tensor) -> None:
        """Remembers it as it is: no view of the chunk, which has to be freed."""
        self._tensors[layer] = past


def prepend_past(
    layer: nn.Module, x: Tensor, num_first: int, num_later: int, cache: StreamCache | None
) -> Tensor:
    """Puts the past in front of (B, T, ...): copies of the first frame, or the cached frames."""
    past = cache.get(layer) if cache is not None else None
    if past is None:
        past = x[:, :1].expand(-1, num_first, -1, -1, -1)
    full = torch.cat([past, x], dim=1)
    if cache is not None:
        cache.put(layer, full[:, full.shape[1] - num_later :].clone())
    return full


class PointwiseConv(nn.Module):
    """1x1x1 convolution: (B, T, H, W, C) -> (B, T, H, W, C')."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return F.linear(x, self.conv3d.weight.flatten(1), self.conv3d.bias)
        # As a convolution it runs in oneDNN, which uses AVX-512 on every CPU; MKL does not on AMD.
        rows = x.flatten(0, 2)[:, None].permute(0, 3, 1, 2)
        out = F.conv2d(rows, self.conv3d.weight.squeeze(2), self.conv3d.bias)
        return out.permute(0, 2, 3, 1).reshape(*x.shape[:4], -1)


class SpatialConv(nn.Module):
    """1x3x3 convolution per frame, zero padding; with stride 2, one zero right and below."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv3d = nn.Conv3d(in_channels, out_channels, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        frames = x.reshape(b * t, h, w, c).permute(0, 3, 1, 2)
        if self.stride == 2:
            frames = F.pad(frames, (0, 1, 0, 1))
        weight = self.conv3d.weight.squeeze(2)
        out = F.conv2d(
            frames, weight, self.conv3d.bias, stride=self.stride, padding=2 - self.stride
        )
        return out.permute(0, 2, 3, 1).unflatten(0, (b, t))


class TemporalConv(nn.Module):
    """3x1x1 convolution, causal: the first frame is replicated in front."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv3d = nn.Conv3d(in_channels, out_channels, (3, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        if self.stride == 1:
            x = prepend_past(self, x, 2, 2, cache)
        return self.apply_kernel(x)

    def apply_kernel(self, x: Tensor) -> Tensor:
        """The convolution alone, on frames that already include the past."""
        b, t, h, w, c = x.shape
        columns = x.reshape(b, t, h * w, c).permute(0, 3, 1, 2)
        weight = self.conv3d.weight.squeeze(-1)
        out = F.conv2d(columns, weight, self.conv3d.bias, stride=(self.stride, 1))
        return out.permute(0, 2, 3, 1).unflatten(2, (h, w))


class FactorizedConv(nn.Sequential):
    """1x3x3 then 3x1x1."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            SpatialConv(in_channels, out_channels), TemporalConv(out_channels, out_channels)
        )

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        return self[1](self[0](x), cache)


class FrameNorm(nn.Module):
    """GroupNorm with one group, per frame (statistics over H, W and C), which keeps causality."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        b, t, h, w, c = x.shape
        frames = self.norm(x.reshape(b * t, h, w, c).permute(0, 3, 1, 2))
        return frames.permute(0, 2, 3, 1).reshape(b, t, h, w, c)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 shortcut where widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = FactorizedConv(in_channels, out_channels)
        self.norm2 = FrameNorm(out_channels)
        self.conv2 = FactorizedConv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = PointwiseConv(in_channels, out_channels)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        out = self.conv1(F.silu(self.norm1(x)), cache)
        out = self.conv2(F.silu(self.norm2(out)), cache)
        return (self.nin_shortcut(x) if self.has_shortcut else x) + out


class _Attention(nn.Module):
    """What both attentions share: norm, single-head q/k/v, output projection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels)
        self.q = PointwiseConv(channels, channels)
        self.k = PointwiseConv(channels, channels)
        self.v = PointwiseConv(channels, channels)
        self.proj_out = PointwiseConv(channels, channels)


class SpatialAttention(_Attention):
    """Every pixel of a frame attends to all pixels of the same frame."""

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        normed = self.norm(x)
        # (B, T, 1, H * W, C): the axis of one head lets the fused kernels take it.
        q, k, v = (layer(normed).flatten(2, 3)[:, :, None] for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        return x + self.proj_out(out.reshape(x.shape))


class TemporalAttention(_Attention):
    """Every pixel attends to the same pixel in this and earlier frames."""

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        normed = self.norm(x)
        # (B, T, H, W, C) -> (B, H * W, T, C): time becomes the sequence axis, a pixel a head.
        q, k, v = (
            layer(normed).flatten(2, 3).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        past = cache.get(self) if cache is not None else None
        if cache is not None:
            both = torch.stack([k, v])
            both = both if past is None else torch.cat([past, both], dim=3)
            cache.put(self, both)
            k, v = both.unbind(0)
        if past is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            num_new, num_all = q.shape[2], k.shape[2]
            mask = torch.ones(num_new, num_all, dtype=torch.bool, device=x.device)
            mask = mask.tril(num_all - num_new)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class FactorizedAttention(nn.Sequential):
    """Spatial, then temporal attention."""

    def __init__(self, channels: int) -> None:
        super().__init__(SpatialAttention(channels), TemporalAttention(channels))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        return self[1](self[0](x), cache)


class HybridDownsample(nn.Module):
    """Halves space and/or time: strided convolution plus average pool, then 1x1x1."""

    def __init__(self, channels: int, spatial: bool, temporal: bool) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        if spatial:
            self.conv1 = SpatialConv(channels, channels, stride=2)
        if temporal:
            self.conv2 = TemporalConv(channels, channels, stride=2)
        if spatial or temporal:
            self.conv3 = PointwiseConv(channels, channels)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        if self.spatial:
            b, t, h, w, c = x.shape
            frames = x.reshape(b * t, h, w, c).permute(0, 3, 1, 2)
            # The published network pools the frame padded by one zero; stride 2 never reads it.
            pooled = F.avg_pool2d(frames, 2).permute(0, 2, 3, 1).unflatten(0, (b, t))
            x = self.conv1(x) + pooled
        if self.temporal:
            # Output j reads frames 2j-2 .. 2j (convolution) and 2j-1, 2j (average).
            full = prepend_past(self, x, 2, 1, cache)
            pairs = x if full.shape[1] == x.shape[1] + 1 else full[:, 1:]
            pairs = pairs.unflatten(1, (-1, 2))
            x = self.conv2.apply_kernel(full) + pairs.mean(dim=2)
        return self.conv3(x) if self.spatial or self.temporal else x


class HybridUpsample(nn.Module):
    """Doubles space and/or time: nearest repetition plus a residual convolution, then 1x1x1."""

    def __init__(self, channels: int, spatial: bool, temporal: bool) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        if temporal:
            self.conv1 = TemporalConv(channels, channels)
        if spatial:
            self.conv2 = SpatialConv(channels, channels)
        if spatial or temporal:
            self.conv3 = PointwiseConv(channels, channels)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        if self.temporal:
            x = x.repeat_interleave(2, dim=1)
            if cache is None or cache.is_first:
                x = x[:, 1:]
            x = x + self.conv1(x, cache)
        if self.spatial:
            b, t, h, w, c = x.shape
            x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
            x = x.reshape(b, t, h * 2, w * 2, c)
            x = x + self.conv2(x)
        return self.conv3(x) if self.spatial or self.temporal else x
