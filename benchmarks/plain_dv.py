"""The DV network written the plain way, as the published TorchScript files are built.

Flows in: a :class:`DVNetwork`, whose parameters are shared. Flows out: TorchScript modules of the
same function with activations (B, C, T, H, W): Conv3d with explicit causal padding, wavelets as
grouped strided convolutions, GroupNorm on rearranged frames, attention as products and softmax.
It is the peer that ``bench_tokenizer.py`` measures the native network against.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_posttrain.tokenizer.fsq import FSQ
from cosmos_posttrain.tokenizer.layers import FrameNorm, HybridDownsample, HybridUpsample
from cosmos_posttrain.tokenizer.network import DVDecoder, DVEncoder, DVNetwork


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B * T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def _clip(frames: Tensor, batch: int) -> Tensor:
    """(B * T, C, H, W) -> (B, C, T, H, W)."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class Conv(nn.Module):
    """Causal convolution: replicates the first frame in time, pads zeros in space."""

    def __init__(self, conv: nn.Conv3d, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        self.conv, self.stride = conv, stride

    def forward(self, x: Tensor) -> Tensor:
        kt, kh, _ = self.conv.kernel_size
        past = kt - 1 + 1 - self.stride[0]
        if past > 0:
            x = torch.cat([x[:, :, :1].expand(-1, -1, past, -1, -1), x], dim=2)
        if self.stride[1] == 1 and kh > 1:
            x = F.pad(x, (1, 1, 1, 1, 0, 0))
        return F.conv3d(x, self.conv.weight, self.conv.bias, self.stride)


class Norm(nn.Module):
    """GroupNorm per frame."""

    def __init__(self, norm: FrameNorm) -> None:
        super().__init__()
        self.norm = norm.norm

    def forward(self, x: Tensor) -> Tensor:
        return _clip(self.norm(_frames(x)), x.shape[0])


def _factorized(pair: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(Conv(layer.conv3d) for layer in pair.children()))


class Residual(nn.Module):
    """Residual block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(block.norm1), Norm(block.norm2)
        self.conv1, self.conv2 = _factorized(block.conv1), _factorized(block.conv2)
        self.shortcut = Conv(block.nin_shortcut.conv3d) if block.has_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(_silu(self.norm1(x)))
        out = self.conv2(_silu(self.norm2(out)))
        return self.shortcut(x) + out


class Attention(nn.Module):
    """Attention over a frame's pixels, or causal over time at each pixel."""

    def __init__(self, layer: nn.Module, temporal: bool) -> None:
        super().__init__()
        self.temporal, self.norm = temporal, Norm(layer.norm)
        self.q, self.k, self.v = (Conv(part.conv3d) for part in (layer.q, layer.k, layer.v))
        self.proj_out = Conv(layer.proj_out.conv3d)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        normed = self.norm(x)
        order = (0, 3, 4, 2, 1) if self.temporal else (0, 2, 3, 4, 1)
        length = t if self.temporal else h * w
        q, k, v = (
            layer(normed).permute(order).reshape(-1, length, c)
            for layer in (self.q, self.k, self.v)
        )
        scores = torch.bmm(q, k.transpose(1, 2)) * c**-0.5
        if self.temporal:
            scores = scores.masked_fill(torch.ones_like(scores).tril() == 0, float("-inf"))
        out = torch.bmm(torch.softmax(scores, dim=2), v)
        if self.temporal:
            out = out.reshape(b, h, w, t, c).permute(0, 4, 3, 1, 2)
        else:
            out = out.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)
        return x + self.proj_out(out)


class Down(nn.Module):
    """Strided convolution plus average pool, space then time, then 1x1x1."""

    def __init__(self, layer: HybridDownsample) -> None:
        super().__init__()
        self.conv1 = Conv(layer.conv1.conv3d, (1, 2, 2)) if layer.spatial else None
        self.conv2 = Conv(layer.conv2.conv3d, (2, 1, 1)) if layer.temporal else None
        self.conv3 = Conv(layer.conv3.conv3d)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv1 is not None:
            x = F.pad(x, (0, 1, 0, 1, 0, 0))
            x = self.conv1(x) + F.avg_pool3d(x, (1, 2, 2), (1, 2, 2))
        if self.conv2 is not None:
            x = torch.cat([x[:, :, :1], x], dim=2)
            x = self.conv2(x) + F.avg_pool3d(x, (2, 1, 1), (2, 1, 1))
        return self.conv3(x)


class Up(nn.Module):
    """Repetition plus a residual convolution, time then space, then 1x1x1."""

    def __init__(self, layer: HybridUpsample) -> None:
        super().__init__()
        self.conv1 = Conv(layer.conv1.conv3d) if layer.temporal else None
        self.conv2 = Conv(layer.conv2.conv3d) if layer.spatial else None
        self.conv3 = Conv(layer.conv3.conv3d)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv1 is not None:
            x = x.repeat_interleave(2, dim=2)[:, :, 1:]
            x = x + self.conv1(x)
        if self.conv2 is not None:
            x = x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4)
            x = x + self.conv2(x)
        return self.conv3(x)


def _wavelet(axis: int, band: int, channels: int, device: torch.device) -> Tensor:
    taps = torch.tensor([1.0, -1.0 if band else 1.0], device=device) * 0.5**0.5
    shape = [1, 1, 1, 1, 1]
    shape[2 + axis] = 2
    return taps.reshape(shape).repeat(channels, 1, 1, 1, 1)


def _stride(axis: int) -> tuple[int, int, int]:
    return tuple(2 if i == axis else 1 for i in range(3))  # type: ignore[return-value]


class Patcher(nn.Module):
    """Haar transform as grouped strided convolutions, one axis at a time."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1].expand(-1, -1, self.patch_size - 1, -1, -1), x], dim=2)
        for _ in range(self.patch_size.bit_length() - 1):
            parts = [x]
            for axis in range(3):
                parts = [
                    F.conv3d(
                        part,
                        _wavelet(axis, band, part.shape[1], x.device).to(x.dtype),
                        stride=_stride(axis),
                        groups=part.shape[1],
                    )
                    for part in parts
                    for band in range(2)
                ]
            x = torch.cat(parts, dim=1) / 8**0.5
        return x


class Unpatcher(nn.Module):
    """The inverse of :class:`Patcher`."""

    def __init__(self, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.patch_size.bit_length() - 1):
            parts = list(x.chunk(8, dim=1))
            for axis in (2, 1, 0):
                wide = [
                    F.conv_transpose3d(
                        part,
                        _wavelet(axis, i % 2, part.shape[1], x.device).to(x.dtype),
                        stride=_stride(axis),
                        groups=part.shape[1],
                    )
                    for i, part in enumerate(parts)
                ]
                parts = [low + high for low, high in zip(wide[::2], wide[1::2], strict=True)]
            x = parts[0] * 8**0.5
        return x[:, :, self.patch_size - 1 :]


def _level(level: nn.Module) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, block in enumerate(level.block):
        layers.append(Residual(block))
        if len(level.attn) > 0:
            layers.extend(Attention(part, j == 1) for j, part in enumerate(level.attn[i]))
    if hasattr(level, "downsample") and (level.downsample.spatial or level.downsample.temporal):
        layers.append(Down(level.downsample))
    if hasattr(level, "upsample") and (level.upsample.spatial or level.upsample.temporal):
        layers.append(Up(level.upsample))
    return nn.Sequential(*layers)


def _middle(mid: nn.Module) -> list[nn.Module]:
    attention = [Attention(part, j == 1) for j, part in enumerate(mid.attn_1)]
    return [Residual(mid.block_1), *attention, Residual(mid.block_2)]


def _stack(half: DVEncoder | DVDecoder) -> list[nn.Module]:
    """conv_in, levels and middle in the half's order, norm, silu, conv_out."""
    if isinstance(half, DVEncoder):
        body = [*(_level(level) for level in half.down), *_middle(half.mid)]
    else:
        body = [*_middle(half.mid), *(_level(level) for level in reversed(half.up))]
    ends = [Norm(half.norm_out), nn.SiLU(), _factorized(half.conv_out)]
    return [_factorized(half.conv_in), *body, *ends]


class PlainEncoder(nn.Module):
    """``encoder.jit``: video -> (indices, codes, loss)."""

    def __init__(self, network: DVNetwork) -> None:
        super().__init__()
        patcher = Patcher(network.config.patch_size)
        self.layers = nn.Sequential(
            patcher, *_stack(network.encoder), Conv(network.quant_conv.conv3d)
        )
        self.quantizer: FSQ = network.quantizer

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = self.quantizer.quantize(self.layers(video).permute(0, 2, 3, 4, 1))
        indices = self.quantizer.codes_to_indices(codes)
        return indices, codes.to(video.dtype).permute(0, 4, 1, 2, 3), codes.new_zeros(1)


class PlainDecoder(nn.Module):
    """``decoder.jit``: indices -> video."""

    def __init__(self, network: DVNetwork) -> None:
        super().__init__()
        self.quantizer: FSQ = network.quantizer
        unpatcher = Unpatcher(network.config.patch_size)
        self.layers = nn.Sequential(
            Conv(network.post_quant_conv.conv3d), *_stack(network.decoder), unpatcher
        )

    def forward(self, indices: Tensor) -> Tensor:
        codes = self.quantizer.indices_to_codes(indices).permute(0, 4, 1, 2, 3)
        video: Tensor = self.layers(codes.to(next(self.layers.parameters()).dtype))
        return video


def plain_torchscript(
    network: DVNetwork, video: Tensor, indices: Tensor
) -> tuple[torch.jit.ScriptModule, torch.jit.ScriptModule]:
    """Traces the plain encoder and decoder on these inputs."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        encoder = torch.jit.trace(PlainEncoder(network).eval(), video, check_trace=False)
        decoder = torch.jit.trace(PlainDecoder(network).eval(), indices, check_trace=False)
    return encoder, decoder
