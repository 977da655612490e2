"""Checkpoints of models that several ranks hold: saved at any layout, loaded at any other.

Flows in: a model on this rank, optionally its optimizer. Flows out: a ``weights`` folder, which is
a Megatron torch_dist checkpoint with NeMo's key names (prefix ``module.``); or the same model with
the folder's weights. Each rank writes and reads its own part, a piece at a time, straight from and
into its own memory: see ``pieces``. All ranks take part in every call, and fail together.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import guard, pieces
from cosmos_posttrain.checkpoint.pieces import PartitionedOptimizer, Piece
from cosmos_posttrain.checkpoint.reading import refusal
from cosmos_posttrain.checkpoint.torch_dist import (
    BACKEND,
    Index,
    TorchDistReader,
    TorchDistWriter,
    is_torch_dist,
    write_index,
)
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import (
    CheckpointError,
    CosmosPosttrainError,
    SaveError,
    UnreadableCheckpointError,
)
from cosmos_posttrain.files import read_json

_WRITABLE = (
    "make sure that every machine sees the folder and that there is room, then give the same "
    "command again"
)
_READABLE = "make sure that every machine can read the folder, then give the same command again"


@dataclass(frozen=True)
class RankPart:
    """This rank's part of a checkpoint: its pieces, and the values that lie beside all tensors."""

    pieces: list[Piece]
    common: dict[str, Any]


def own_part(model: nn.Module, optimizer: PartitionedOptimizer | None = None) -> RankPart:
    """What this rank writes: views of its memory."""
    with cpu_device():
        return RankPart(list(pieces.to_write(model, optimizer)), _common(optimizer))


def save(folder: Path, model: nn.Module, optimizer: PartitionedOptimizer | None = None) -> None:
    """Writes the model (and optimizer) into an existing empty folder; every rank takes part.

    The folder is a checkpoint only when this has returned.

    Raises:
        SaveError: on every rank, if any of them could not write its part.
    """
    write(folder, own_part(model, optimizer))


def write(folder: Path, part: RankPart, group: Any = None) -> None:
    """``save`` of what was taken from a model before.

    Args:
        folder: existing and empty.
        part: of this rank.
        group: all ranks, for a thread beside others that use the usual one; None means that.

    Raises:
        SaveError: on every rank, if any of them could not write its part.
    """
    writer = TorchDistWriter(folder, launch.rank())
    with _together(SaveError, SaveError, f"{folder} cannot be written", _WRITABLE, group):
        try:
            for piece in part.pieces:
                writer.add_box(piece.key, piece.shape, piece.box)
        finally:
            writer.close()
    indexes = _gather(writer.index, group)
    with _together(SaveError, SaveError, f"{folder} cannot be written", _WRITABLE, group):
        if launch.is_rank_zero():
            write_index(folder, indexes, part.common)


def num_bytes(model: nn.Module, optimizer: PartitionedOptimizer | None = None) -> int:
    """Bytes of the numbers that ``save`` writes, over all ranks; every rank takes part.

    The files are larger by about a kilobyte for each piece.
    """
    return sum(_all(sum(piece.box[1].nbytes for piece in own_part(model, optimizer).pieces)))


def load(folder: Path, model: nn.Module, optimizer: PartitionedOptimizer | None = None) -> None:
    """Reads the weights (and the optimizer's state) into a built model, at its own layout.

    Settings (learning rate, weight decay) stay as the optimizer was built with; the number of its
    steps comes from the folder.

    Raises:
        CheckpointError: on every rank; the folder is damaged, or does not fit the model.
        UnreadableCheckpointError: on every rank; one of them cannot read it, or does not see it.
    """
    kinds = (CheckpointError, UnreadableCheckpointError)
    with _together(*kinds, f"{folder} cannot be read", _READABLE):
        # A run goes on from nothing but what it wrote; a model is read as fast as may be.
        reader, common = _open(folder, verify=optimizer is not None)
        step = _saved_step(folder, common) if optimizer else 0
        with cpu_device():
            wanted = list(pieces.to_read(model, optimizer, reader.shapes.keys()))
        _check(reader, wanted)
        by_key: dict[str, list[Piece]] = {}
        for piece in wanted:
            by_key.setdefault(piece.key, []).append(piece)
        for key, same in by_key.items():
            reader.read_into(key, [piece.box for piece in same])
        if optimizer is not None:
            optimizer.set_step(step)


def _common(optimizer: PartitionedOptimizer | None) -> dict[str, Any]:
    """What lies beside the tensors, in the words of Megatron's optimizers."""
    if optimizer is None:
        return {}
    groups = {"optimizer": {"param_groups": optimizer.param_groups()}}
    return {"optimizer": {**groups, "param_state_sharding_type": "fully_reshardable"}}


def _saved_step(folder: Path, common: dict[str, Any]) -> int:
    try:
        saved = common["optimizer"]
        if isinstance(saved, list):  # as NeMo writes it
            (saved,) = saved
        return max(int(group["step"]) for group in saved["optimizer"]["param_groups"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no optimizer state; a run can start from it (--model_path), but not "
            "go on from it."
        ) from error


def _open(folder: Path, verify: bool) -> tuple[TorchDistReader, dict[str, Any]]:
    """The tensors of a folder, and the values beside them."""
    if not is_torch_dist(folder):
        raise UnreadableCheckpointError(
            f"{folder} holds no Megatron torch_dist checkpoint; check the path."
        )
    kinds = (CheckpointError, "restore the checkpoint", UnreadableCheckpointError)
    form = read_json(folder / "metadata.json", *kinds)
    if form.get("sharded_backend") != BACKEND["sharded_backend"]:
        raise CheckpointError(
            f"{folder} is in Megatron's form {form.get('sharded_backend')!r}, not in torch_dist; "
            "restore the checkpoint."
        )
    return TorchDistReader(folder, verify), guard.read_common(folder)


def _check(reader: TorchDistReader, wanted: list[Piece]) -> None:
    """Names everything that does not fit.

    Raises:
        CheckpointError: tensors are missing, are other objects, or have another shape.
    """
    shapes = {piece.key: piece.shape for piece in wanted}
    objects = sorted(shapes.keys() & reader.objects)
    if objects:
        raise CheckpointError(
            f"{reader.folder} holds a pickled object instead of a tensor as {', '.join(objects)}, "
            "which was not executed; use a checkpoint from a source that you trust."
        )
    missing = sorted(shapes.keys() - reader.shapes.keys())
    problems = [f"lacks {', '.join(missing)}"] if missing else []
    for key in sorted(shapes.keys() & reader.shapes.keys()):
        if shapes[key] != reader.shapes[key]:
            problems.append(f"has {key} of shape {reader.shapes[key]} instead of {shapes[key]}")
    if problems:
        raise CheckpointError(
            f"{reader.folder} does not fit the model: it {'; '.join(problems)}; give the "
            "checkpoint that belongs to it."
        )


def _all(value: Any, group: Any = None) -> list[Any]:
    """Every rank's value, on every rank."""
    values = [value] * launch.world_size()
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value, group=group)
    return values


def _gather(index: Index, group: Any) -> list[Index]:
    """All ranks' indexes, on rank 0; elsewhere nothing."""
    if launch.world_size() == 1:
        return [index]
    indexes: list[Any] | None = [None] * launch.world_size() if launch.is_rank_zero() else None
    torch.distributed.gather_object(index, indexes, group=group)
    return indexes or []


@contextlib.contextmanager
def _together(
    kind: type[CosmosPosttrainError],
    refused: type[CosmosPosttrainError],
    what: str,
    fix: str,
    group: Any = None,
) -> Iterator[None]:
    """Raises on every rank what went wrong on any of them, so that none waits for another.

    Args:
        kind: of the error that is raised.
        refused: its kind where the system of any rank refused something.
        what: how its sentence begins then.
        fix: how it ends then.
        group: all ranks; None means the usual group.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    is_refused = not isinstance(problem, CosmosPosttrainError) or isinstance(problem, refused)
    sentence = problem and _sentence(problem, what, fix)
    mine = problem and (sentence or f"{what} ({problem!r}).", is_refused)
    told = _all(mine, group)
    if problem is not None and sentence is None:
        raise problem  # not what happens to files but a fault of this package
    raised = refused if any(text and text[1] for text in told) else kind
    for number, text in enumerate(told):
        if text is not None and (raised is kind or text[1]):
            raise raised(text[0] if number == 0 else f"rank {number}: {text[0]}") from problem


def _sentence(error: BaseException, what: str, fix: str) -> str | None:
    """The sentence for what happens to files and memory; None for anything else."""
    if isinstance(error, CosmosPosttrainError):
        return str(error)
    said = file_error(error) or refusal(error)
    return None if said is None else f"{what} ({said}); {fix}."


def file_error(error: BaseException) -> str | None:
    """What the file system said, where that is behind an error; else None."""
    waiting, seen = [error], list[BaseException]()
    while waiting:
        cause = waiting.pop()
        if isinstance(cause, OSError):
            return str(cause.strerror or cause)
        # torch.save raises an error of its own when a write fails, and torch's distributed
        # checkpoints one with what failed on each rank.
        inner = [failed for failed, *_ in getattr(cause, "failures", {}).values()]
        seen.append(cause)
        waiting += [x for x in (cause.__context__, *inner) if x is not None and x not in seen]
    return None


def quiet_megatron_logging() -> None:
    """Keeps Megatron's and torch's notes about checkpoint internals out of the progress lines."""
    for name in ("megatron.core", "torch.distributed.checkpoint"):
        logging.getLogger(name).setLevel(logging.ERROR)
