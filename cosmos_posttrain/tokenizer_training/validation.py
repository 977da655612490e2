"""How good a network is on clips that training never sees.

Flows in: the averaged network and clips (N, 3, T, H, W) in [-1, 1]. Flows out: numbers, and the
first clip's reconstruction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_posttrain.tokenizer.network import DVNetwork
from cosmos_posttrain.tokenizer_training.losses import psnr, ssim


@torch.no_grad()
def measure(
    network: DVNetwork, clips: Tensor, device: torch.device
) -> tuple[dict[str, float], Tensor]:
    """Encodes and decodes one clip at a time.

    Args:
        network: on ``device``.
        clips: (N, 3, T, H, W) float32 in [-1, 1], N at least 1.
        device: to run on.

    Returns:
        What metrics.jsonl records, and the reconstruction (3, T, H, W) of the first clip.
    """
    scores, first = [], None
    counts = torch.zeros(network.quantizer.vocab_size)
    for clip in clips.split(1):
        video = clip.to(device)
        indices = network.encode(video)
        decoded = network.decode(indices)
        first = decoded[0] if first is None else first
        scores.append(torch.stack([psnr(decoded, video)[0], ssim(decoded, video)[0]]))
        counts += torch.bincount(indices.flatten().cpu().long(), minlength=len(counts))
    assert first is not None
    shares = counts[counts > 0] / counts.sum()
    mean = torch.stack(scores).mean(0)
    metrics = {
        "validation_psnr": mean[0].item(),
        "validation_ssim": mean[1].item(),
        "validation_codes_used": int((counts > 0).sum()),
        "validation_entropy_bits": -(shares * shares.log2()).sum().item(),
    }
    return metrics, first
