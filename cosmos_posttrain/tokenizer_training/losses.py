"""Reconstruction losses and quality measures of tokenizer training.

Flows in: real and reconstructed clips (B, 3, T, H, W) in [-1, 1]. Flows out: a scalar to minimise,
and PSNR and SSIM to report.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_posttrain.tokenizer_training.config import LossConfig


def multiscale_gradient(reconstruction: Tensor, video: Tensor, num_scales: int) -> Tensor:
    """Mean absolute error of horizontal, vertical and temporal differences, over a pyramid.

    Stands in for a perceptual network: it asks for the right edges and the right motion at every
    scale, whatever the local brightness. Scale s averages 2**s x 2**s pixels.
    """
    error = (reconstruction - video).transpose(1, 2).flatten(0, 1)
    num_frames = video.shape[2]
    total = error.new_zeros(())
    for scale in range(num_scales):
        if scale > 0:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        if num_frames > 1:
            clips = error.unflatten(0, (-1, num_frames))
            total = total + clips.diff(dim=1).abs().mean()
    return total / num_scales


def reconstruction_loss(reconstruction: Tensor, video: Tensor, config: LossConfig) -> Tensor:
    """The weighted sum of L1, L2, the multi-scale gradient term and, where asked for, SSIM."""
    error = reconstruction - video
    loss = config.l1 * error.abs().mean() + 4 * config.l2 * error.square().mean()
    if config.gradient > 0:
        term = multiscale_gradient(reconstruction, video, config.gradient_scales)
        loss = loss + config.gradient * term
    if config.ssim > 0:
        loss = loss + config.ssim * ssim_loss(reconstruction, video)
    return loss


def ssim_loss(reconstruction: Tensor, video: Tensor) -> Tensor:
    """1 - mean structural similarity, without rounding or clamping, so it has gradients.

    Returns:
        () float32 in [0, 2].
    """
    return 1 - _ssim_map((reconstruction + 1) * 127.5, (video + 1) * 127.5).mean()


def psnr(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip, after rounding to 8 bits.

    Returns:
        (B,) float32 in dB.
    """
    error = _to_pixels(reconstruction) - _to_pixels(video)
    return -10 * torch.log10(error.square().flatten(1).mean(1).clamp_min(1e-10) / 255**2)


def ssim(reconstruction: Tensor, video: Tensor) -> Tensor:
    """Structural similarity of each clip (Wang et al. 2004): uniform 7x7 windows, per channel.

    Returns:
        (B,) float32, the mean over frames, channels and windows.
    """
    score = _ssim_map(_to_pixels(reconstruction), _to_pixels(video))
    return score.unflatten(0, (video.shape[0], -1)).flatten(1).mean(1)


def _ssim_map(reconstruction: Tensor, video: Tensor) -> Tensor:
    """SSIM of each window: (B, 3, T, H, W) in [0, 255] -> (B * T * 3, 1, H - 6, W - 6)."""
    x, y = (v.transpose(1, 2).flatten(0, 2)[:, None] for v in (reconstruction, video))
    window = 7
    unbiased = window**2 / (window**2 - 1)
    mean_x, mean_y = F.avg_pool2d(x, window, 1), F.avg_pool2d(y, window, 1)
    var_x = unbiased * (F.avg_pool2d(x * x, window, 1) - mean_x**2)
    var_y = unbiased * (F.avg_pool2d(y * y, window, 1) - mean_y**2)
    cov = unbiased * (F.avg_pool2d(x * y, window, 1) - mean_x * mean_y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mean_x * mean_y + c1) * (2 * cov + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )


def _to_pixels(video: Tensor) -> Tensor:
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round()
