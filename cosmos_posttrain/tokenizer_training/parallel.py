"""Data parallelism of tokenizer training: plain torch.distributed, gloo or NCCL.

Flows in: how the processes were launched. Flows out: this process's share of a batch, and sums over
all processes. The tokenizers are small enough for one GPU, so nothing here needs Megatron. Without
a launcher every method is the identity.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosmos_posttrain import launch
from cosmos_posttrain.distributed import meeting

# The slowest thing that ranks wait for is rank 0 validating and writing pictures.
_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class DataParallelRanks:
    """This process among those that torchrun started.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> DataParallelRanks:
        """Reads what torchrun sets; one process where it did not."""
        return cls(launch.rank(), launch.world_size())

    @property
    def is_first(self) -> bool:
        """True in the process that writes, prints and validates."""
        return self.rank == 0

    def start(self, device: torch.device) -> None:
        """Makes the process group, where there are several processes, and waits for all."""
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            meeting.make_group("nccl", _TIMEOUT, device_id=device)
        else:
            meeting.make_group("gloo", _TIMEOUT)
        dist.barrier()

    def stop(self) -> None:
        """Takes the process group down."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module with gradients averaged over the processes and rank 0's weights."""
        if self.size == 1:
            return module
        # They differ along axes of one entry only, as channels-last kernels of 3x1x1 have.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # Since torch 2.13; its new name means another thing.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of (B, ...), of which there are B / size."""
        return batch.chunk(self.size)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, without gradients."""
        value = value.detach()
        if self.size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, value: bool, device: torch.device) -> bool:
        """Whether it is true in any process; the same answer in all of them."""
        if self.size == 1:
            return value
        box = torch.tensor(int(value), device=device)
        dist.all_reduce(box, op=dist.ReduceOp.MAX)
        return bool(box)

    def gather(self, rows: Tensor) -> Tensor:
        """(b, ...) of each process -> (b * size, ...) in rank order, without gradients."""
        rows = rows.detach()
        if self.size == 1:
            return rows
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def gather_with_gradients(self, rows: Tensor) -> Tensor:
        """As :meth:`gather`, for a loss of all rows that every process computes alike.

        The gradient of the own rows comes back multiplied by ``size``, which makes up for
        DistributedDataParallel's average.
        """
        if self.size == 1:
            return rows
        gathered: Tensor = _GatherRows.apply(rows, self)
        return gathered


class _GatherRows(torch.autograd.Function):
    """:meth:`DataParallelRanks.gather_with_gradients`; its backward needs no communication."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: DataParallelRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ranks: DataParallelRanks = ctx.ranks
        return ranks.share(gradient) * ranks.size, None
