"""Megatron distributed checkpoints (torch_dist): saved at any layout, loaded at any other.

Flows in: a model on this rank, optionally its optimizer. Flows out: a ``weights`` folder with
NeMo's key names (prefix ``module.``), written to a temporary name and renamed when every rank is
done; or the same model with the folder's weights.
"""

from __future__ import annotations

import logging
import pickle
import warnings
from pathlib import Path
from typing import Any, Protocol

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from cosmos_posttrain.checkpoint import guard
from cosmos_posttrain.checkpoint.torch_dist import PREFIX, is_torch_dist
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.builder import CosmosGPTModel


class ShardedOptimizer(Protocol):
    """What this module needs of Megatron's optimizers."""

    def sharded_state_dict(self, model_state: dict, is_loading: bool, metadata: dict) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


def _metadata() -> dict[str, Any]:
    """How states are laid out on disk: whole tensors, so that any layout can read them."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _model_state(model: CosmosGPTModel) -> dict[str, Any]:
    state = model.sharded_state_dict(prefix=PREFIX, metadata=_metadata())
    # Transformer Engine's extra states come and go with its version and hold nothing we need.
    return {key: value for key, value in state.items() if "_extra_state" not in key}


def save(folder: Path, model: CosmosGPTModel, optimizer: ShardedOptimizer | None = None) -> None:
    """Writes the model (and optimizer) into an existing empty folder; every rank takes part."""
    with cpu_device():
        state = _model_state(model)
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(
                state, is_loading=False, metadata=_metadata()
            )
        dist_checkpointing.save(state, str(folder), validate_access_integrity=False)


def load(folder: Path, model: CosmosGPTModel, optimizer: ShardedOptimizer | None = None) -> None:
    """Reads the weights (and the optimizer's state) into a built model, at its own layout.

    Raises:
        CheckpointError: the folder is damaged, or does not fit the model.
    """
    if not is_torch_dist(folder):
        raise CheckpointError(f"{folder} holds no Megatron torch_dist checkpoint; check the path.")
    # Megatron reads the index and the common file without a guard of its own.
    index = guard.check_folder(folder)
    with cpu_device():
        wanted = _model_state(model)
        if optimizer is not None:
            wanted["optimizer"] = optimizer.sharded_state_dict(
                wanted, is_loading=True, metadata=_metadata()
            )
        keys = [value.key for value in nested_values(wanted) if isinstance(value, ShardedBase)]
        guard.check_tensors(folder, index, keys)
        try:
            with warnings.catch_warnings():
                # About pieces that torch did not write: they are refused, in our words.
                warnings.filterwarnings("ignore", message="Detected pickle protocol")
                state = dist_checkpointing.load(
                    wanted,
                    str(folder),
                    validate_access_integrity=False,
                    strict=StrictHandling.RAISE_UNEXPECTED,
                )
        except (CheckpointException, Exception) as error:  # the former is no Exception
            raise CheckpointError(
                f"{folder} cannot be loaded into this model ({_reason(error)}); restore the "
                "checkpoint, or give the one that belongs to it."
            ) from error
        loaded_optimizer = state.pop("optimizer", None)
        weights = {key.removeprefix(PREFIX): value for key, value in state.items()}
        result = model.load_state_dict(weights, strict=False)
        missing = [key for key in result.missing_keys if "_extra_state" not in key]
        if missing or result.unexpected_keys:
            raise CheckpointError(
                f"{folder} does not fit the model: missing {missing}, unexpected "
                f"{list(result.unexpected_keys)}."
            )
        if optimizer is not None:
            optimizer.load_state_dict(loaded_optimizer)


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, on the first rank where torch collects them."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors, which was not executed"
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def quiet_megatron_logging() -> None:
    """Keeps Megatron's and torch's notes about checkpoint internals out of the progress lines."""
    for name in ("megatron.core", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
