"""``load_model``: a path becomes a model that can be asked for logits.

Works in a plain Python process (a world of one) and under torchrun (tensor parallel).
"""

from __future__ import annotations

from pathlib import Path

import torch

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.source import CheckpointSource, open_source
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import build_model


def load_source(
    source: CheckpointSource,
    dtype: str | torch.dtype | None = None,
    tensor_model_parallel_size: int = 1,
    layer_spec: str = "torch",
    seed: int = 1234,
    device: str | None = None,
) -> ARModel:
    """Builds the model of an opened source on this rank, for inference.

    Args:
        source: what to load.
        dtype: see ``load_model``, as the next three.
        tensor_model_parallel_size: see there.
        layer_spec: see there.
        seed: see there.
        device: ``cpu`` leaves the weights there on a machine with a GPU too; None means this
            process's.
    """
    source.config.check_tensor_parallel(tensor_model_parallel_size)
    groups.initialize(groups.Parallelism(tensor=tensor_model_parallel_size), seed)
    own = launch.parse_dtype(dtype)
    module = build_model(
        source.config,
        dtype=own,
        layer_spec=layer_spec,
        seed=seed,
        device=device,
        perform_initialization=source.is_fresh,  # else every weight is read
    )
    source.load_weights(module)
    return ARModel(module, source.contract)


def load_model(
    path: str | Path,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    tensor_model_parallel_size: int = 1,
    *,
    latent_shape: LatentShape | None = None,
    vocab_size: int | None = None,
    rope_scaling: str = "none",
    rope_scale: float | None = None,
    layer_spec: str = "torch",
    seed: int = 1234,
) -> ARModel:
    """Loads a Cosmos autoregressive model.

    Args:
        path: a Hugging Face id, a folder with ``model.pt`` and ``config.json``, a checkpoint or run
            folder of this package, or ``random:<size>``.
        device: ``auto``, or the device type that this machine has (``cuda`` where there is a GPU,
            else ``cpu``).
        dtype: None means the checkpoint's own on a GPU and float32 on the CPU.
        tensor_model_parallel_size: ranks that share the model; needs torchrun when above 1.
        latent_shape: another token grid than the checkpoint's.
        vocab_size: vocabulary of fresh weights.
        rope_scaling: ``none``, ``interpolate`` or ``yarn``, where ``latent_shape`` is larger than
            the checkpoint's; see ``ModelConfig.at_grid``.
        rope_scale: replaces the ratio of the two grids.
        layer_spec: ``torch`` or ``te``.
        seed: of fresh weights.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: the path holds no model, or a damaged one.
        ConfigError: sizes that do not fit the model or the number of processes.
    """
    present = launch.device().type
    if device not in ("auto", present):
        raise ConfigError(
            f"device {device!r} is not what this process runs on; use 'auto' or {present!r}."
        )
    source = open_source(path).at_grid(latent_shape, rope_scaling, rope_scale, vocab_size)
    return load_source(source, dtype, tensor_model_parallel_size, layer_spec, seed)
