"""How close a reconstruction is to its clip, and how well a vocabulary is used.

Flows in: clips and reconstructions as (3, T, H, W) uint8, and token counts. Flows out: PSNR, SSIM,
codes used and entropy. PSNR and SSIM are scikit-image's, the reference that papers report; the
differentiable versions in ``training`` agree with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

SSIM_WINDOW = 7
# Reported where a clip comes back exactly: JSON has no infinity.
MAX_PSNR = 100.0


def psnr(clip: Tensor, reconstruction: Tensor, num_threads: int = 1) -> float:
    """Peak signal-to-noise ratio of a clip, ``10 log10(255^2 / MSE)``.

    Args:
        clip: (3, T, H, W) uint8.
        reconstruction: likewise.
        num_threads: frames that are compared at a time; does not change the result.

    Returns:
        dB, at most ``MAX_PSNR``; the MSE is taken over all frames, pixels and channels.
    """
    return psnr_of(float(np.mean(_by_frame(frame_error, clip, reconstruction, num_threads))))


def psnr_of(error: float) -> float:
    """PSNR in dB of a mean squared error, at most ``MAX_PSNR``."""
    return min(10 * math.log10(255**2 / error), MAX_PSNR) if error > 0 else MAX_PSNR


def ssim(clip: Tensor, reconstruction: Tensor, num_threads: int = 1) -> float:
    """Structural similarity (Wang et al. 2004), the mean over frames and colour channels.

    scikit-image's defaults: uniform 7x7 windows, sample covariance, K1 0.01, K2 0.03.

    Args:
        clip: (3, T, H, W) uint8, H and W at least 7.
        reconstruction: likewise.
        num_threads: frames that are compared at a time; does not change the result.

    Returns:
        At most 1, which means equal.
    """
    return float(np.mean(_by_frame(frame_ssim, clip, reconstruction, num_threads)))


def psnr_by_frame(clip: Tensor, reconstruction: Tensor, num_threads: int = 1) -> list[float]:
    """PSNR in dB of each frame; see ``psnr``."""
    return [psnr_of(e) for e in _by_frame(frame_error, clip, reconstruction, num_threads)]


def ssim_by_frame(clip: Tensor, reconstruction: Tensor, num_threads: int = 1) -> list[float]:
    """Of each frame; see ``ssim``."""
    return _by_frame(frame_ssim, clip, reconstruction, num_threads)


def frame_error(frame: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Mean squared error of two frames of one shape, uint8."""
    from skimage.metrics import mean_squared_error

    return float(mean_squared_error(frame, other))


def frame_ssim(frame: NDArray[np.uint8], other: NDArray[np.uint8], channel_axis: int = 0) -> float:
    """SSIM of two frames, uint8, the mean over channels; see ``ssim``."""
    from skimage.metrics import structural_similarity

    options = {"win_size": SSIM_WINDOW, "data_range": 255, "channel_axis": channel_axis}
    return float(structural_similarity(frame, other, **options))


def _by_frame(
    function: Callable[..., float], clip: Tensor, reconstruction: Tensor, num_threads: int
) -> list[float]:
    """Frame by frame, because scikit-image computes in float64."""
    pairs = (
        tuple(v[:, number].numpy() for v in (clip, reconstruction))
        for number in range(clip.shape[1])
    )
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda pair: function(*pair), pairs))


def count_codes(indices: Tensor, vocab_size: int) -> NDArray[np.int64]:
    """How often each code occurs: (vocab_size,) int64."""
    return np.bincount(indices.flatten().cpu().numpy(), minlength=vocab_size).astype(np.int64)


def codebook_use(counts: NDArray[np.int64]) -> dict[str, float]:
    """Of counts (vocab_size,): number of codes used, their share, and the entropy in bits.

    The entropy is that of the codes' frequencies, ``-sum(p log2 p)``; ``log2(vocab_size)`` when all
    are used equally often. It cannot exceed ``log2`` of the number of tokens.
    """
    used = counts[counts > 0]
    shares = used / max(int(used.sum()), 1)
    return {
        "num_tokens": int(used.sum()),
        "codes_used": len(used),
        "vocabulary_share": len(used) / len(counts),
        "entropy_bits": float(-(shares * np.log2(shares)).sum()) + 0.0,
    }
