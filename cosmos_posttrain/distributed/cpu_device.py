"""Lets Megatron-Core run on the CPU, over gloo.

Megatron names CUDA in a handful of places: ``torch.cuda.current_device()`` as the device of a new
tensor, ``device="cuda"``, ``Tensor.cuda()``, ``torch.cuda.synchronize()``, and assertions on
``Tensor.type()``. Inside ``cpu_device()`` these mean the CPU. Where CUDA exists it does nothing.

It costs a Python call for every torch function, so it is entered around set-up, schedules,
optimizer steps and checkpoints, and ``plain_torch()`` leaves it again for the forward pass of the
model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Maps CUDA devices to the CPU in every torch function that is called inside it."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron asserts on 'torch.cuda.FloatTensor' and its kin.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Stands for CUDA calls that have no meaning on the CPU."""


_PATCHES: dict[str, Callable] = {
    "torch.cuda.current_device": lambda: "cpu",
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.set_device": _nothing,
    "torch.cuda.synchronize": _nothing,
    "torch.cuda.empty_cache": _nothing,
    # Recomputation saves and restores the CUDA generator beside the CPU's.
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": lambda *_, **__: None,
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": _nothing,
    # Keeps dropout apart between ranks; these models have no dropout.
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork": (
        lambda *_, **__: contextlib.nullcontext()
    ),
}


@contextlib.contextmanager
def cuda_calls_mean_cpu() -> Iterator[None]:
    """The cheap half of ``cpu_device``: CUDA functions only, tensor creation is not intercepted.

    Enough for forward passes under sequence parallelism, which ask for the current device.
    """
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            for name, replacement in _PATCHES.items():
                stack.enter_context(mock.patch(name, replacement))
        yield


@contextlib.contextmanager
def cpu_device() -> Iterator[None]:
    """Megatron's CUDA calls mean the CPU inside; nothing at all happens where CUDA exists."""
    with contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(cuda_calls_mean_cpu())
            stack.enter_context(_CudaMeansCpu())
        yield


def plain_torch() -> contextlib.AbstractContextManager:
    """Leaves the interception of ``cpu_device`` for a forward pass (full speed)."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return torch._C.DisableTorchFunction()
