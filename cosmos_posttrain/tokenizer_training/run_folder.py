"""The folder of a tokenizer training: who may write there, and what a killed run goes on from.

Flows in: the config, and the state after a step. Flows out: ``train.yaml`` (the resolved config),
``config.json`` and ``model.safetensors`` (what ``load_tokenizer`` reads), and ``checkpoint.pt``;
each is written atomically.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import config as config_module
from cosmos_posttrain import files
from cosmos_posttrain.errors import CheckpointError, ConfigError, OutputFolderError, SaveError
from cosmos_posttrain.tokenizer.network import DVNetwork
from cosmos_posttrain.tokenizer.weights_io import write_native
from cosmos_posttrain.tokenizer_training.config import TokenizerTrainConfig

CHECKPOINT = "checkpoint.pt"
RECORDED = "train.yaml"

# What a run may be continued with: none of it decides what is trained, or on what. A lower learning
# rate is what helps a run that has diverged.
_MAY_CHANGE = {"output_dir", "log_every", "validate_every", "save_every", "optimizer.lr"}


def check(output: Path, config: TokenizerTrainConfig) -> None:
    """Empty or absent: start. The same run: continue. Anything else is refused; writes nothing.

    Raises:
        OutputFolderError: it holds something else, or another run.
    """
    recorded = output / RECORDED
    if recorded.is_file():
        try:
            # With the defaults below: options that a run's release did not have were off in it.
            before = dict(_settings(config_module.merge(TokenizerTrainConfig, recorded)))
        except ConfigError as error:
            raise OutputFolderError(
                f"{recorded} does not hold the settings of a run of this release; choose another "
                "--output_dir."
            ) from error
        now = dict(_settings(config))
        changed = [k for k in sorted(before | now) if before.get(k) != now.get(k)]
        changed = [key for key in changed if key not in _MAY_CHANGE]
        if changed:
            raise OutputFolderError(
                f"{output} holds a run with another {', '.join(changed)}; "
                "choose another --output_dir, or repeat that run's settings to continue it."
            )
    elif files.foreign_names(output, lambda name: name == RECORDED):
        raise OutputFolderError(
            f"{output} holds something else than a tokenizer training; choose another --output_dir."
        )


def _settings(config: object) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every setting."""

    def walk(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return walk(config_module.to_dict(config), "")


def start(output: Path, config: TokenizerTrainConfig) -> None:
    """Removes what a killed run left half-written, and records the config."""
    files.remove_leftovers(output)
    files.write_text(output / RECORDED, config_module.to_yaml(config))


def is_finite(value: Any) -> bool:
    """Whether every number of every tensor in nested dicts and lists is finite."""
    # One answer is taken from each device, not one for each tensor.
    answers: dict[torch.device, list[Tensor]] = {}
    for tensor in _tensors(value):
        if tensor.is_floating_point():
            answers.setdefault(tensor.device, []).append(tensor.isfinite().all())
    return all(bool(torch.stack(found).all()) for found in answers.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def save(output: Path, state: dict[str, Any], average: DVNetwork, dtype: torch.dtype) -> None:
    """Writes the shipped weights, then the checkpoint.

    Args:
        output: the folder.
        state: what ``load`` gives back; nothing but plain values and tensors.
        average: the network that is shipped.
        dtype: of the shipped weights.

    Raises:
        SaveError: they cannot be written; what was saved before is still there.
    """
    try:
        write_native(output, average, dtype)
        with files.replacing(output / CHECKPOINT) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError when the disk is full
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SaveError(
            f"step {state['completed_steps']} could not be saved in {output} ({reason}); the save "
            "before it is still there: make room, and give the same command again."
        ) from error


def load(output: Path, device: torch.device) -> dict[str, Any]:
    """The state that was saved last; empty if there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    path = output / CHECKPOINT
    if not path.is_file():
        return {}
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, UnpicklingError) as error:
        raise damaged(path, error) from error
    return state


def damaged(path: Path, error: Exception) -> CheckpointError:
    """The sentence about a checkpoint that cannot be taken up."""
    reason = (str(error).strip() or "it ends early").splitlines()[0]
    return CheckpointError(
        f"{path} cannot be read ({reason}); copy it again, or remove the run's folder to start "
        "anew."
    )
