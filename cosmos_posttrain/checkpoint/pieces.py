"""Which boxes of the tensors on disk this rank holds, and where they lie in its memory.

Flows in: a model on this rank, and what its data-parallel optimizer keeps here. Flows out: pieces.
Those to write hold every number of the run exactly once over all ranks; those to read hold all that
this rank needs. Nothing is copied or sent: a piece is a view of the rank's own memory.

The optimizer's part of a parameter is a range of its numbers, row after row. On disk the parameter
is a box of a larger tensor (tensor parallel rows or columns, layers stacked), so the range becomes
boxes: the rest of a row, whole rows, the beginning of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor, nn

from cosmos_posttrain.checkpoint.torch_dist import AVERAGE, PREFIX, STATE, Box
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.chunks import chunks_of
from cosmos_posttrain.models.lora import is_factor
from cosmos_posttrain.models.medusa import MEDUSA

MASTER = "param"  # float32 master weights, in Megatron's words


@dataclass(frozen=True)
class Piece:
    """A box of a tensor on disk.

    Attributes:
        key: of the tensor.
        shape: of the whole tensor.
        box: where the piece begins in it, and this rank's memory.
    """

    key: str
    shape: tuple[int, ...]
    box: Box


@dataclass(frozen=True)
class OwnPart:
    """What this data-parallel rank's optimizer keeps of one parameter.

    Attributes:
        parameter: the parameter, as this rank's model holds it.
        start: the first of its numbers that this rank keeps, counted row after row.
        stop: one behind the last.
        state: (stop - start,) tensors by name: ``exp_avg``, ``exp_avg_sq``, and ``param`` (float32
            master weights) unless the parameter's own memory is what the optimizer updates; and
            ``ema`` where an average is kept.
    """

    parameter: Tensor
    start: int
    stop: int
    state: dict[str, Tensor]


class PartitionedOptimizer(Protocol):
    """What checkpoints need of an optimizer whose state is divided over data-parallel ranks."""

    def own_parts(self) -> Iterable[OwnPart]:
        """This rank's parts; in memory, with zeros before the first step."""
        ...

    def param_groups(self) -> list[dict[str, Any]]:
        """Plain values of the parameter groups, with the number of steps as ``step``."""
        ...

    def set_step(self, step: int) -> None:
        """Goes on counting at ``step`` completed steps."""
        ...


@dataclass(frozen=True)
class _Area:
    """A contiguous part of a parameter (or buffer) that is a box of one tensor on disk."""

    owner: Tensor
    begin: int
    place: ShardedTensor

    @property
    def key(self) -> str:
        return str(self.place.key)

    def cut(self, key: str, start: int, stop: int, values: Tensor) -> Iterator[Piece]:
        """Pieces of this area in the owner's numbers [start, stop), which lie in ``values``."""
        shape, stacked = self.place.local_shape, self.place.prepend_axis_num
        low, high = max(start, self.begin), min(stop, self.begin + prod(shape))
        at = low - start
        for offsets, sizes in boxes(shape, low - self.begin, high - self.begin):
            inside = (*[0] * stacked, *offsets)
            place = [a + b for a, b in zip(self.place.global_offset, inside, strict=True)]
            memory = values[at : at + prod(sizes)].view(*[1] * stacked, *sizes)
            yield Piece(key, tuple(self.place.global_shape), (place, memory))
            at += prod(sizes)


def boxes(
    shape: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts the numbers [start, stop) of a row-major tensor into boxes, in their order.

    Yields:
        Where a box begins, and its sizes.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = prod(shape[1:])
    number, inside = divmod(start, row)
    if inside or stop - start < row:
        end = min(stop, (number + 1) * row)
        for offsets, sizes in boxes(shape[1:], inside, end - number * row):
            yield (number, *offsets), (1, *sizes)
    else:
        count = (stop - start) // row
        end = start + count * row
        yield (number, *[0] * (len(shape) - 1)), (count, *shape[1:])
    yield from boxes(shape, end, stop)


def to_write(model: nn.Module, optimizer: PartitionedOptimizer | None) -> Iterator[Piece]:
    """This rank's part of the checkpoint; all ranks together give every number once.

    Weights that the optimizer divides are written by the rank that updates them, so that each rank
    writes as much; others by the first rank that holds them.
    """
    parts = _by_parameter(optimizer)
    for area in _areas(model):
        *others, data_rank = area.place.replica_id
        if any(others):
            continue
        own = parts.get(id(area.owner))
        numbers = area.owner.detach().view(-1)
        if own is not None:
            yield from area.cut(area.key, own.start, own.stop, numbers[own.start : own.stop])
            for name, values in own.state.items():
                yield from area.cut(f"{STATE}{name}.{area.key}", own.start, own.stop, values)
        elif data_rank == 0 and not (optimizer and area.owner.requires_grad):
            yield from area.cut(area.key, 0, numbers.numel(), numbers)


def to_read(
    model: nn.Module, optimizer: PartitionedOptimizer | None, keys: Collection[str]
) -> Iterator[Piece]:
    """All that this rank needs of a checkpoint.

    A weight's float32 numbers are its master weights where the checkpoint has them, and the weight
    itself where it was trained in float32. So a run may go on in another dtype. An average begins
    with them where the checkpoint has none. LoRA's factors and Medusa heads stay as they begin
    where only weights are read and the checkpoint has none.

    Args:
        model: this rank's model.
        optimizer: None reads the weights alone.
        keys: what the checkpoint holds.
    """
    parts = _by_parameter(optimizer)
    for area in _areas(model):
        is_beside = is_factor(area.key) or area.key.startswith(PREFIX + MEDUSA)
        if optimizer is None and is_beside and area.key not in keys:
            continue
        numbers = area.owner.detach().view(-1)
        master = f"{STATE}{MASTER}.{area.key}"
        exact = master if master in keys else area.key
        is_updated = optimizer is not None and area.owner.requires_grad
        key = exact if is_updated and area.owner.dtype == torch.float32 else area.key
        yield from area.cut(key, 0, numbers.numel(), numbers)
        own = parts.get(id(area.owner))
        if own is not None:
            for name, values in own.state.items():
                key = f"{STATE}{name}.{area.key}"
                if name == MASTER or (name == AVERAGE and key not in keys):
                    key = exact
                yield from area.cut(key, own.start, own.stop, values)


def _by_parameter(optimizer: PartitionedOptimizer | None) -> dict[int, OwnPart]:
    parts = list(optimizer.own_parts()) if optimizer else []
    by_parameter = {id(part.parameter): part for part in parts}
    assert len(by_parameter) == len(parts)
    return by_parameter


def _areas(model: nn.Module) -> Iterator[_Area]:
    """Where this rank's parameters lie on disk, as Megatron's layers say."""
    for chunk in chunks_of(model):
        yield from _areas_of(chunk)


def _areas_of(model: CosmosGPTModel) -> Iterator[_Area]:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(prefix=PREFIX, metadata={"dp_cp_group": group})
    # Transformer Engine's extra states come and go with its version and hold nothing we need.
    state = {key: value for key, value in state.items() if "_extra_state" not in key}
    found = set()
    for value in nested_values(state):
        owner = value.data
        # A gated layer's two halves lie in two places.
        is_split = isinstance(value, ShardedTensorFactory)
        for place in nested_values(value.build()) if is_split else [value]:
            assert isinstance(place, ShardedTensor) and place.data.is_contiguous(), place
            yield _Area(owner, place.data.storage_offset() - owner.storage_offset(), place)
        found.add(id(owner))
    lost = [name for name, tensor in model.named_parameters() if id(tensor) not in found]
    assert not lost, lost
