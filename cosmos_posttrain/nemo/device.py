"""What NeMo needs on the CPU beyond ``distributed.cpu_device``.

Flows in: nothing. Flows out: a context in which NeMo's CUDA calls mean the CPU; where CUDA exists
it does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from megatron.core import tensor_parallel
from torch.overrides import TorchFunctionMode

from cosmos_posttrain.distributed.cpu_device import cpu_device


class _NothingPinned(TorchFunctionMode):
    """Each logged value is asked to be pinned."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def nemo_device() -> Iterator[None]:
    """NeMo's CUDA calls mean the CPU inside; nothing at all happens where CUDA exists."""
    if torch.cuda.is_available():
        yield
        return
    from nemo.lightning.io import pl

    with (
        patch.object(pl, "_fix_tensors_device", lambda checkpoint: checkpoint),
        patch.object(tensor_parallel, "model_parallel_cuda_manual_seed", lambda *_, **__: None),
        cpu_device(),
        _NothingPinned(),
    ):
        yield
