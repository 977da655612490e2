"""How well the GPUs are used.

Flows in: tokens per second. Flows out: the share of the GPUs' peak that went into the model.
"""

from __future__ import annotations

import torch

from cosmos_posttrain import launch
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.training.flops import PEAK_FLOPS, flops_per_token


def model_flops_utilization(tokens_per_second: float, model: ModelConfig) -> float | None:
    """Share of the GPUs' peak that went into model FLOPs; None where the peak is not known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((value for part, value in PEAK_FLOPS.items() if part in name), None)
    if peak is None:
        return None
    return tokens_per_second * flops_per_token(model) / (peak * launch.world_size())
