"""Checkpoints as Megatron writes and reads them itself, and as this package did until its writer.

Flows in: a model on this rank, optionally its optimizer. Flows out: a ``weights`` folder, or the
tensors that Megatron reads from one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state

from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.training.optimizer import CheckpointableOptimizer


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _state(
    model: CosmosGPTModel, optimizer: CheckpointableOptimizer | None, is_loading: bool
) -> dict[str, Any]:
    state = model.sharded_state_dict(prefix="module.", metadata=_metadata())
    state = {key: value for key, value in state.items() if "_extra_state" not in key}
    if optimizer is not None:
        state["optimizer"] = optimizer.optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=_metadata()
        )
    return state


def save_with_megatron(
    folder: Path, model: CosmosGPTModel, optimizer: CheckpointableOptimizer | None = None
) -> None:
    """Gathers the optimizer's state on every rank and writes it in whole tensors."""
    with cpu_device():
        state = _state(model, optimizer, is_loading=False)
        dist_checkpointing.save(state, str(folder), validate_access_integrity=False)


def read_with_megatron(
    folder: Path, model: CosmosGPTModel, optimizer: CheckpointableOptimizer | None = None
) -> dict[str, Any]:
    """What Megatron reads for this rank; into the model's own memory where it can."""
    with cpu_device():
        wanted = _state(model, optimizer, is_loading=True)
        loaded: dict[str, Any] = dist_checkpointing.load(
            wanted, str(folder), validate_access_integrity=False, strict="raise_unexpected"
        )
    return loaded
