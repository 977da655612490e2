"""The processes of one preparation: who am I, and the few moments when all of them meet.

Flows in: the launcher's environment (none under plain python). Flows out: values that rank 0
decided on. Gloo, so that no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

from cosmos_posttrain import launch
from cosmos_posttrain.errors import CosmosPosttrainError

T = TypeVar("T")

# Ranks wait for the slowest one at the end, which may take as long as the whole job.
_PATIENCE = timedelta(days=30)


class Ranks:
    """A context in which ``rank`` and ``world_size`` hold; makes its own gloo group if needed."""

    def __init__(self) -> None:
        self.rank = launch.rank()
        self.world_size = launch.world_size()
        self._group: Any = None
        self._owns_world = False

    def __enter__(self) -> Ranks:
        if self.world_size > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=_PATIENCE)
                self._owns_world = True
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._owns_world:
            import torch.distributed as dist

            dist.destroy_process_group()

    def barrier(self) -> None:
        """Waits until every rank is here."""
        self.decide(lambda: None, gather_first=True)

    def decide(self, function: Callable[[], T], gather_first: bool = False) -> T:
        """Rank 0 calls ``function``; every rank gets its result, or raises its error.

        Args:
            function: called on rank 0 only; result and error must be picklable.
            gather_first: wait for every rank before calling.
        """
        if self.world_size == 1:
            return function()
        import torch.distributed as dist

        if gather_first:
            dist.barrier(self._group)
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = function()
            except CosmosPosttrainError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[1] is not None:
            raise box[1]
        return box[0]
