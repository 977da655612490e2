"""What a step does to the network: forward, recentring, averaging, learning rates.

Flows in: clips (B, 3, T, H, W) in [-1, 1]. Flows out: latents and reconstructions, and a network
and its moving average that have been moved on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cosmos_posttrain.tokenizer.layers import TemporalConv
from cosmos_posttrain.tokenizer.network import DVNetwork
from cosmos_posttrain.tokenizer_training.config import TokenizerOptimizerConfig


class Autoencoder(nn.Module):
    """The network's whole training forward, which is what gets compiled and data-parallel.

    Args:
        network: whose parameters are trained.
        precision: ``float32``, or ``bfloat16`` for autocast.
    """

    def __init__(self, network: DVNetwork, precision: str) -> None:
        super().__init__()
        self.network = network
        self.precision = precision

    def forward(self, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encodes, quantizes and decodes.

        Args:
            video: (B, 3, T, H, W) float32 in [-1, 1].
            noise: (B, t, h, w, D) in [0, 1) that stands for the rounding; None rounds.

        Returns:
            Latents (B, t, h, w, D) before the quantizer and the reconstruction, both float32.
        """
        with autocast(video.device, self.precision):
            latents = self.network.latents(video).float()
            reconstruction = self.network.decode_codes(self._quantize(latents, noise))
        return latents, reconstruction.float()

    def _quantize(self, latents: Tensor, noise: Tensor | None) -> Tensor:
        quantizer = self.network.quantizer
        if noise is None:
            return quantizer.quantize(latents)
        bounded = quantizer.bound(latents)
        return (bounded + noise.to(bounded) - 0.5) / quantizer.width


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 autocast where ``precision`` asks for it, else nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def latent_shape(network: DVNetwork, video: tuple[int, ...]) -> tuple[int, ...]:
    """(B, t, h, w, D) of clips (B, 3, T, H, W)."""
    batch, _, num_frames, height, width = video
    rate = network.config.compression
    return (
        batch,
        1 + (num_frames - 1) // rate.time,
        height // rate.height,
        width // rate.width,
        network.config.embedding_dim,
    )


def last_layer(network: DVNetwork) -> Tensor:
    """The decoder's last weight (patch_size^3 * 3, patch_size^3 * 3, 3, 1, 1)."""
    layer = network.decoder.conv_out[1]
    assert isinstance(layer, TemporalConv)
    return layer.conv3d.weight


def parameter_groups(network: DVNetwork) -> list[dict[str, Any]]:
    """The decoder's last layer learns slower: its outputs, wavelet bands, add up in a pixel."""
    last = list(network.decoder.conv_out.parameters())
    last_ids = {id(p) for p in last}
    rest = [p for p in network.parameters() if id(p) not in last_ids]
    slow = network.config.patch_size**-1.5
    return [{"params": rest, "lr_scale": 1.0}, {"params": last, "lr_scale": slow}]


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scales gradients down to a norm of ``limit`` (0 does not); returns the norm () before."""
    return nn.utils.clip_grad_norm_(parameters, limit or math.inf)


def learning_rate(options: TokenizerOptimizerConfig, step: int, max_steps: int) -> float:
    """Linear warm-up, then a cosine down to ``min_lr_ratio``."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    share = (step - options.warmup_steps) / max(max_steps - options.warmup_steps, 1)
    low = options.min_lr_ratio
    return options.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share)))


@torch.no_grad()
def recenter_latents(network: DVNetwork, latents: Tensor, rate: float, latent_std: float) -> None:
    """Nudges ``quant_conv`` towards latents of zero mean, equal variance and no correlation.

    Without it, codes die in the first steps, when the encoder changes fastest. The step is that
    of adaptive decorrelation: W <- (I - rate / 2 (cov - I)) W.

    Args:
        network: its ``quant_conv`` is changed in place.
        latents: (B, t, h, w, D) of the whole batch.
        rate: share of the gap that is closed.
        latent_std: standard deviation that is aimed at.
    """
    flat = latents.detach().float().flatten(0, 3)
    excess = torch.cov(flat.T) / latent_std**2 - torch.eye(flat.shape[1], device=flat.device)
    # A large excess must shrink the latents, not turn them around.
    excess = excess / (1 + torch.linalg.matrix_norm(excess, 2) * rate)
    step = torch.eye(flat.shape[1], device=flat.device) - rate / 2 * excess
    conv = network.quant_conv.conv3d
    assert conv.bias is not None
    conv.weight.copy_((step @ conv.weight.flatten(1)).view_as(conv.weight))
    conv.bias.copy_(step @ (conv.bias - rate * flat.mean(0)))


@torch.no_grad()
def update_average(average: DVNetwork, network: DVNetwork, ema_decay: float, step: int) -> None:
    """Exponential moving average of the weights, shorter in the first steps."""
    decay = min(ema_decay, (1 + step) / (10 + step))
    for mean, weight in zip(average.parameters(), network.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)
