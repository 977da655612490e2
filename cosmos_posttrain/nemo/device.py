"""What NeMo needs on the CPU beyond ``distributed.cpu_device``.

Flows in: nothing. Flows out: a context in which NeMo's CUDA calls mean the CPU; where CUDA exists
it does nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from cosmos_posttrain.distributed.cpu_device import Patches, cpu_device


class _NothingPinned(TorchFunctionMode):
    """Each logged value is asked to be pinned."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*args, **kwargs)


_PATCHES = Patches(
    lambda: {
        "nemo.lightning.io.pl._fix_tensors_device": lambda checkpoint: checkpoint,
        "megatron.core.tensor_parallel.model_parallel_cuda_manual_seed": lambda *_, **__: None,
    }
)


@contextlib.contextmanager
def nemo_device() -> Iterator[None]:
    """NeMo's CUDA calls mean the CPU inside; nothing at all happens where CUDA exists."""
    if torch.cuda.is_available():
        yield
        return
    with _PATCHES, cpu_device(), _NothingPinned():
        yield
