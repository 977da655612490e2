"""Weights of 8 bits for decoding, by torchao (extra ``int8``).

Flows in: an ``ARModel``. Flows out: the same model, with the matrices of its layers as whole
numbers with one scale for each row; activations, embedding and output rows stay as they are. For
memory: a matrix is a half of what it is in bfloat16, a quarter of float32.
"""

from __future__ import annotations

import torch
from torch import nn

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.ar_model import ARModel


def check_quantization(quantization: str | None, decoding: str) -> None:
    """Refuses what cannot be had, before weights are loaded.

    Raises:
        ConfigError: torchao is missing, or the modules are asked for, which take no such weights.
    """
    if quantization is None:
        return
    if decoding == "modules":
        raise ConfigError(
            f"--quantization {quantization} does not go with --decoding modules, which takes the "
            "weights as they are; leave one of them out."
        )
    try:
        import torchao.quantization  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"--quantization {quantization} needs torchao, which is not installed; pip install "
            "'cosmos_posttrain[int8]', or leave it out."
        ) from error


def quantize(model: ARModel, device: torch.device | None = None) -> None:
    """Rounds the layers' matrices to 8 bits, in place, one at a time.

    The model can be decoded from then on, and nothing else. Of a model on the CPU, a GPU holds the
    rounded weights and one matrix more at most. Under tensor parallelism each rank
    rounds its own part: scales of the rows that are split differ with its size.

    Args:
        model: stays where it is, or goes to ``device``.
        device: where matrices are rounded, each after it was taken there; None is where they are.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for module in model.module.decoder.layers.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
            continue
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        there = weight.detach().to(device or weight.device).contiguous()
        linear.weight = nn.Parameter(there, requires_grad=False)
        module.weight = None  # held by `linear` alone, which lets it go
        del weight, there
        with torch.no_grad():
            quantize_(linear, Int8WeightOnlyConfig())
        module.weight = linear.weight
    if device is not None:
        model.module.to(device)
