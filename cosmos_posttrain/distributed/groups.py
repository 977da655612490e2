"""Process groups: one call sets up torch.distributed and Megatron's parallel state.

Flows in: parallel sizes. Flows out: initialised process groups. In a plain Python process a world
of one is set up once, an existing process group is reused, and everything is torn down when the
interpreter exits.
"""

from __future__ import annotations

import atexit
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel

from cosmos_posttrain import launch
from cosmos_posttrain.distributed import meeting
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError

T = TypeVar("T")

# The slowest thing that ranks wait for is rank 0 checking or writing a large file.
_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class Parallelism:
    """Sizes of the parallel groups; what is left of the world is data parallelism.

    Attributes:
        tensor: ranks that share each layer.
        pipeline: ranks that share the layers.
        context: ranks that share each sequence.
        virtual_pipeline: parts of the layers on each pipeline rank; see ``models/chunks.py``.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    virtual_pipeline: int = 1

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model (context-parallel ranks counted in)."""
        return self.tensor * self.pipeline * self.context


def check_world(parallelism: Parallelism, world_size: int | None = None) -> None:
    """Refuses parallel sizes that the processes cannot hold.

    Args:
        parallelism: the sizes.
        world_size: number of processes; None means those that were launched.

    Raises:
        ConfigError: names the numbers and the torchrun command that would fit.
    """
    for name in ("tensor", "pipeline", "context"):
        if getattr(parallelism, name) < 1:
            raise ConfigError(f"the {name} parallel size must be at least 1.")
    needed, present = parallelism.model_size, world_size or launch.world_size()
    if present % needed:
        raise ConfigError(
            f"tensor x pipeline x context parallel size {parallelism.tensor} x "
            f"{parallelism.pipeline} x {parallelism.context} needs a multiple of {needed} "
            f"processes, but {present} {'was' if present == 1 else 'were'} started; start with "
            f"torchrun --nproc-per-node={needed}, or choose smaller sizes."
        )


def start() -> None:
    """Makes torch's process group, or takes the one that is there; a world of one is made too."""
    if torch.distributed.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    # Megatron overlaps communication and computation by the order in which it queues them.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if on_gpu:
        torch.cuda.set_device(launch.device())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if launch.is_launched():
        meeting.make_group(backend, _TIMEOUT)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    atexit.register(shutdown)


def _matches(parallelism: Parallelism) -> bool:
    return (
        parallel_state.get_tensor_model_parallel_world_size() == parallelism.tensor
        and parallel_state.get_pipeline_model_parallel_world_size() == parallelism.pipeline
        and parallel_state.get_context_parallel_world_size() == parallelism.context
    )


def initialize(parallelism: Parallelism, seed: int = 1234) -> None:
    """Sets up the process groups (again, if they exist with other sizes) and the seeds.

    Raises:
        ConfigError: the sizes do not fit the number of processes.
    """
    check_world(parallelism)
    start()
    with cpu_device():
        if parallel_state.model_parallel_is_initialized() and not _matches(parallelism):
            parallel_state.destroy_model_parallel()
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallelism.tensor,
                pipeline_model_parallel_size=parallelism.pipeline,
                context_parallel_size=parallelism.context,
                create_gloo_process_groups=torch.cuda.is_available(),
                distributed_timeout_minutes=int(_TIMEOUT.total_seconds() // 60),
            )
    # No groups of its own: Megatron's schedules ask for it.
    chunks = parallelism.virtual_pipeline
    parallel_state.set_virtual_pipeline_model_parallel_world_size(chunks if chunks > 1 else None)
    set_seed(seed)


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy, torch and, on a GPU, Megatron's per-group CUDA generators.

    Pipeline stages get different seeds, so that their fresh layers differ.
    """
    if parallel_state.model_parallel_is_initialized():
        seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def data_parallel_place() -> tuple[int, int]:
    """Number of this rank's copy of the model, and how many copies there are."""
    return (
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
    )


def gather(value: T) -> list[T]:
    """What each copy of the model has, in order, on all ranks; values must be picklable."""
    size = parallel_state.get_data_parallel_world_size()
    values = [value] * size
    if size > 1:
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_gather_object(values, value, group=group)
    return values


def shutdown() -> None:
    """Tears the process groups down; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def side_group() -> Any:
    """All ranks once more, over gloo: for a thread beside those that use the other groups.

    None in a world of one.
    """
    if torch.distributed.get_world_size() == 1:
        return None
    return torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)


def barrier() -> None:
    """Waits for all ranks."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def decide(function: Callable[[], T], source: int = 0, group: Any = None) -> T:
    """One rank calls a function; every rank gets its result, or raises its error.

    Args:
        function: called on one rank only; its result and error must be picklable.
        source: that rank, counted over the whole job.
        group: the ranks that get its result, all of which call this; None means all of the job.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size(group) == 1:
        return function()
    box: list[Any] = [None, None]
    if torch.distributed.get_rank() == source:
        try:
            box[0] = function()
        except CosmosPosttrainError as error:
            box[1] = error
    torch.distributed.broadcast_object_list(box, src=source, group=group)
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result


def any_rank(value: int) -> int:
    """The largest of the ranks' whole numbers, on all of them."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    box = torch.tensor([value])  # gloo takes it, so that nobody waits for a GPU
    torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
    return int(box)
