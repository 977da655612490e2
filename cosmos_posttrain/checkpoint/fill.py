"""Whole tensors into a built model, at any layout.

Flows in: a way to get each whole Megatron tensor by its name on disk. Flows out: this rank's
parameters, filled one by one. LoRA's factors and Medusa heads stay
as they begin: no whole tensor is theirs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.models.lora import is_factor
from cosmos_posttrain.models.medusa import MEDUSA
from cosmos_posttrain.models.naming import parameters_by_disk_name


def fill(model: nn.Module, whole_tensor: Callable[[str], Tensor]) -> None:
    """Asks for the whole of each of this rank's tensors and keeps this rank's part."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    with torch.no_grad():
        for name, parameter in parameters_by_disk_name(model):
            if is_factor(name) or name.startswith(MEDUSA):
                continue
            parameter.copy_(mapping.shard(name, whole_tensor(name), rank, size))
