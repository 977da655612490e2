"""The published discrete video (DV) network: encoder, FSQ, decoder.

Flows in: video (B, 3, T, H, W) in [-1, 1]. Flows out: token indices (B, t, h, w), and back.
``config.json`` fields and parameter names are those of the published checkpoints (Cosmos World
Foundation Model Platform, section 4; REFERENCE facts: 4x8x8, 8x8x8, 8x16x16).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.geometry import Compression
from cosmos_posttrain.tokenizer.fsq import FSQ
from cosmos_posttrain.tokenizer.haar import HaarPatcher, HaarUnpatcher
from cosmos_posttrain.tokenizer.layers import (
    FactorizedAttention,
    FactorizedConv,
    FrameNorm,
    HybridDownsample,
    HybridUpsample,
    PointwiseConv,
    ResidualBlock,
    StreamCache,
)

_POSITIVE = (
    "channels", "channels_mult", "num_res_blocks", "resolution", "in_channels", "out_channels",
    "z_channels",
)  # fmt: skip


def _log2(value: int) -> int:
    return value.bit_length() - 1


@dataclass(frozen=True)
class DVConfig:
    """``config.json`` of a native tokenizer folder.

    Attributes:
        channels: width of the first layer; level i has ``channels * channels_mult[i]``.
        channels_mult: one factor per resolution level.
        num_res_blocks: residual blocks per level (the decoder has one more).
        resolution: nominal frame size in pixels that ``attn_resolutions`` refers to.
        attn_resolutions: levels of this nominal size get attention.
        patch_size: of the Haar patcher, a power of two.
        z_channels: width between encoder and ``quant_conv``.
        spatial_compression, temporal_compression: pixels and frames per token.
        embedding_dim: numbers per token, one for each of ``levels``.
        levels: FSQ levels.
    """

    channels: int = 128
    channels_mult: tuple[int, ...] = (2, 4, 4)
    num_res_blocks: int = 2
    resolution: int = 1024
    attn_resolutions: tuple[int, ...] = (32,)
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int = 4
    z_channels: int = 16
    spatial_compression: int = 16
    temporal_compression: int = 8
    embedding_dim: int = 6
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    dropout: float = 0.0
    patch_method: str = "haar"
    z_factor: int = 1
    num_groups: int = 1
    legacy_mode: bool = False
    quantizer: str = "FSQ"
    encoder: str = "FACTORIZED"
    decoder: str = "FACTORIZED"
    name: str = "DV"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            items = value if kind is tuple and isinstance(value, tuple) else (value,)
            expected = int if kind is tuple else kind
            if not all(isinstance(item, (expected, int)) for item in items):
                wanted = "a list of whole numbers" if kind is tuple else f"of type {kind.__name__}"
                raise TokenizerError(
                    f"the tokenizer's config cannot be used: {field.name} is {value!r}, it must "
                    f"be {wanted}."
                )
        fixed = {
            "patch_method": "haar",
            "z_factor": 1,
            "num_groups": 1,
            "legacy_mode": False,
            "quantizer": "FSQ",
            "encoder": "FACTORIZED",
            "decoder": "FACTORIZED",
        }
        problems = [
            f"{key} is {getattr(self, key)!r}, only {value!r} is supported"
            for key, value in fixed.items()
            if getattr(self, key) != value
        ]
        for key in _POSITIVE:
            value = getattr(self, key)
            if min(value if isinstance(value, tuple) else (value,), default=1) < 1:
                problems.append(f"{key} is {value}, it must be positive")
        for key in ("patch_size", "spatial_compression", "temporal_compression"):
            value = getattr(self, key)
            if value < 1 or value & (value - 1):
                problems.append(f"{key} is {value}, it must be a power of two")
        if min(self.spatial_compression, self.temporal_compression) < self.patch_size:
            problems.append(f"patch_size {self.patch_size} is larger than the compression factor")
        elif not self._levels_suffice():
            problems.append(f"channels_mult {self.channels_mult} has too few levels")
        if len(self.levels) != self.embedding_dim or min(self.levels, default=0) < 2:
            problems.append(f"levels {self.levels} do not fit embedding_dim {self.embedding_dim}")
        elif math.prod(self.levels) > 2**31:
            problems.append(f"levels {self.levels} make more tokens than int32 can number")
        if problems:
            raise TokenizerError(f"the tokenizer's config cannot be used: {'; '.join(problems)}.")

    @property
    def compression(self) -> Compression:
        """Pixels per token (T, H, W)."""
        return Compression(
            self.temporal_compression, self.spatial_compression, self.spatial_compression
        )

    @property
    def num_spatial_steps(self) -> int:
        """Halvings of height and width after the patcher."""
        return _log2(self.spatial_compression) - _log2(self.patch_size)

    @property
    def num_temporal_steps(self) -> int:
        """Halvings of time after the patcher."""
        return _log2(self.temporal_compression) - _log2(self.patch_size)

    def upsampling(self, level: int) -> tuple[bool, bool]:
        """Whether the decoder doubles (space, time) after a level, counted from the finest."""
        step = len(self.channels_mult) - 1 - level
        temporal = 0 < step <= self.num_temporal_steps
        spatial = step < self.num_spatial_steps > self.num_temporal_steps
        return temporal or spatial, temporal

    def _levels_suffice(self) -> bool:
        """Whether encoder and decoder have room for all their halvings and doublings."""
        last = len(self.channels_mult) - 1
        doublings = [self.upsampling(level) for level in range(1, last + 1)]
        return (
            last >= max(self.num_spatial_steps, self.num_temporal_steps)
            and sum(spatial for spatial, _ in doublings) == self.num_spatial_steps
            and sum(temporal for _, temporal in doublings) == self.num_temporal_steps
        )

    def has_attention(self, level: int) -> bool:
        """Whether the level's residual blocks are followed by attention."""
        return self.resolution // self.patch_size // 2**level in self.attn_resolutions

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DVConfig:
        """Reads the fields of ``config.json``; unknown ones are ignored.

        Raises:
            TokenizerError: if a field is missing, of the wrong type, or not supported.
        """
        required = ("channels", "patch_size", "spatial_compression", "temporal_compression")
        missing = [key for key in (*required, "levels") if key not in values]
        if missing:
            raise TokenizerError(f"the tokenizer's config lacks {', '.join(missing)}.")
        known = {field.name for field in dataclasses.fields(cls)}
        picked: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in values.items()
            if key in known
        }
        try:
            return cls(**picked)
        except TypeError as error:
            raise TokenizerError(
                f"the tokenizer's config has a field of the wrong type: {error}."
            ) from error

    @classmethod
    def from_file(cls, path: Path) -> DVConfig:
        """Reads ``config.json``.

        Raises:
            TokenizerError: if the file is not such a config.
        """
        try:
            values = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TokenizerError(f"{path} is not a readable JSON file: {error}.") from error
        if not isinstance(values, dict):
            raise TokenizerError(f"{path} is not a tokenizer config: it must hold one JSON object.")
        return cls.from_dict(values)


class _Middle(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = FactorizedAttention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, cache), cache), cache)


class _Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the config says so."""

    def __init__(self, widths: list[int], attention: bool) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairs)
        self.attn = nn.ModuleList(FactorizedAttention(b) for _, b in pairs if attention)

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, cache)
            if len(self.attn) > 0:
                x = self.attn[i](x, cache)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x, cache)
        return x


class DVEncoder(nn.Module):
    """Video (B, 3, T, H, W) -> (B, t, h, w, z_channels)."""

    def __init__(self, config: DVConfig) -> None:
        super().__init__()
        self.patcher3d = HaarPatcher(config.patch_size)
        width = config.channels
        self.conv_in = FactorizedConv(config.in_channels * config.patch_size**3, width)
        self.down = nn.ModuleList()
        for i, mult in enumerate(config.channels_mult):
            widths = [width] + [config.channels * mult] * config.num_res_blocks
            level = _Level(widths, config.has_attention(i))
            width = widths[-1]
            if i < len(config.channels_mult) - 1:
                spatial = i < config.num_spatial_steps
                temporal = i < config.num_temporal_steps
                level.downsample = HybridDownsample(width, spatial, temporal)
            self.down.append(level)
        self.mid = _Middle(width)
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorizedConv(width, config.z_channels)

    def forward(self, video: Tensor, cache: StreamCache | None = None) -> Tensor:
        x = self.conv_in(self.patcher3d(video, cache is None or cache.is_first), cache)
        for level in self.down:
            x = level(x, cache)
        x = self.mid(x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class DVDecoder(nn.Module):
    """(B, t, h, w, z_channels) -> video (B, 3, T, H, W)."""

    def __init__(self, config: DVConfig) -> None:
        super().__init__()
        last = len(config.channels_mult) - 1
        width = config.channels * config.channels_mult[-1]
        self.conv_in = FactorizedConv(config.z_channels, width)
        self.mid = _Middle(width)
        levels = []
        for i in range(last, -1, -1):
            widths = [width] + [config.channels * config.channels_mult[i]] * (
                config.num_res_blocks + 1
            )
            level = _Level(widths, config.has_attention(i))
            width = widths[-1]
            if i > 0:
                level.upsample = HybridUpsample(width, *config.upsampling(i))
            levels.append(level)
        # The published names count from the finest level.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = FrameNorm(width)
        self.conv_out = FactorizedConv(width, config.out_channels * config.patch_size**3)
        self.unpatcher3d = HaarUnpatcher(config.patch_size)

    def features(self, latents: Tensor, cache: StreamCache | None = None) -> Tensor:
        """What the last layer turns into wavelet bands: (B, t', h', w', width)."""
        x = self.mid(self.conv_in(latents, cache), cache)
        for level in reversed(self.up):
            x = level(x, cache)
        return F.silu(self.norm_out(x))

    def forward(self, latents: Tensor, cache: StreamCache | None = None) -> Tensor:
        x = self.conv_out(self.features(latents, cache), cache)
        return self.unpatcher3d(x, cache is None or cache.is_first)


class DVNetwork(nn.Module):
    """The whole tokenizer network."""

    def __init__(self, config: DVConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = DVEncoder(config)
        self.decoder = DVDecoder(config)
        self.quant_conv = PointwiseConv(config.z_channels, config.embedding_dim)
        self.post_quant_conv = PointwiseConv(config.embedding_dim, config.z_channels)
        self.quantizer = FSQ(config.levels)
        # The layout that convolutions of channels-last activations read; else each call copies it.
        self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]

    def latents(self, video: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> unquantised latents (B, t, h, w, D)."""
        return self.quant_conv(self.encoder(video, cache))

    def encode(self, video: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Video (B, 3, T, H, W) in [-1, 1] -> indices (B, t, h, w) int32."""
        return self.quantizer.codes_to_indices(self.quantizer.quantize(self.latents(video, cache)))

    def decode_codes(self, codes: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Codes (B, t, h, w, D) in [-1, 1] -> video (B, 3, T, H, W), not clamped."""
        weight = self.post_quant_conv.conv3d.weight
        return self.decoder(self.post_quant_conv(codes.to(weight.dtype)), cache)

    def decode(self, indices: Tensor, cache: StreamCache | None = None) -> Tensor:
        """Indices (B, t, h, w) -> video (B, 3, T, H, W), not clamped."""
        return self.decode_codes(self.quantizer.indices_to_codes(indices), cache)

    def forward(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) -> its reconstruction, straight-through at the rounding."""
        return self.decode_codes(self.quantizer.quantize(self.latents(video)))
