"""Use of the codebook, as something to maximise.

Flows in: unquantised latents. Flows out: a scalar that is 0 when every code is equally likely.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cosmos_posttrain.tokenizer.fsq import FSQ


def code_entropy_loss(latents: Tensor, quantizer: FSQ, temperature: float = 1.0) -> Tensor:
    """How far the codes of a batch are from being equally likely.

    Each latent is assigned to the values of its channel softly, p(v) ~ exp(-(b - v)^2 / T) with b
    the bounded latent and v counted in roundings; a code's probability is the product over
    channels, as the channels of finite scalar quantization are rounded independently. The loss is
    1 - H / log(N), H the entropy of the batch's mean code distribution over N codes: the
    "diversity" half of the entropy term of lookup-free quantization (Yu et al. 2024,
    arXiv:2310.05737, equation 5). Meant for vocabularies of a few thousand codes: it holds
    one number per token and code.

    Args:
        latents: (..., D) float, D the number of the quantizer's levels.
        quantizer: whose codes are counted.
        temperature: T, in squared roundings; smaller is closer to the real codes.

    Returns:
        () float32 in [0, 1].
    """
    bounded = quantizer.bound(latents).flatten(0, -2)
    joint = bounded.new_ones(len(bounded), 1)
    for i, level in enumerate(quantizer.levels):
        values = torch.arange(level, device=bounded.device) - float(quantizer.width[i])
        weights = (-(bounded[:, i, None] - values).square() / temperature).softmax(-1)
        if i + 1 < len(quantizer.levels):
            joint = (weights[:, :, None] * joint[:, None, :]).flatten(1)
    # The last channel only meets the mean: (N_last x tokens) @ (tokens x rest).
    mean = weights.T @ joint / len(bounded)
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum()
    return 1 - entropy / math.log(quantizer.vocab_size)
