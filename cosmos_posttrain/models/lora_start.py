"""How a model with LoRA begins: fresh factors, and everything frozen that is not trained.

Flows in: a built model. Flows out: the same, with A drawn and B zero, so that it computes what it
did without them.
"""

from __future__ import annotations

import zlib

import torch
from megatron.core import parallel_state
from torch import nn

from cosmos_posttrain.models.lora import is_factor
from cosmos_posttrain.models.lora_config import LORA_A
from cosmos_posttrain.models.naming import parameters_by_disk_name

# Trained in full beside the factors: a new tokenizer's tokens have new rows here.
_ROWS = ("embedding.", "output_layer.")


def start_factors(model: nn.Module, seed: int) -> None:
    """Draws A, uniform in +-1/sqrt(inputs), by seed and name: the same at every layout; B is 0."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in parameters_by_disk_name(model):
            if not name.endswith(LORA_A):
                continue
            is_cut = getattr(parameter, "partition_dim", -1) == 1
            width = parameter.shape[1] * (size if is_cut else 1)
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            whole = (2 * torch.rand(len(parameter), width, generator=generator) - 1) / width**0.5
            parameter.copy_(whole.chunk(size, dim=1)[rank] if is_cut else whole)


def freeze_base(model: nn.Module) -> None:
    """Leaves the factors, the embedding and the output rows to be trained; norms stay as well."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_factor(name) or name.startswith(_ROWS))
