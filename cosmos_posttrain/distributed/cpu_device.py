"""Lets Megatron-Core run on the CPU, over gloo.

Megatron names CUDA in a handful of places: ``torch.cuda.current_device()`` as the device of a new
tensor, ``device="cuda"``, ``Tensor.cuda()``, ``torch.cuda.synchronize()``, and assertions on
``Tensor.type()``. Inside ``cpu_device()`` these mean the CPU. Where CUDA exists it does nothing.

It costs a Python call for every torch function, so it is entered around set-up, schedules and
checkpoints only, and ``plain_torch()`` leaves it again for the forward pass of the model; a
schedule's backward pass leaves it by itself.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

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
            name = func(*args)  # inside another of these, it is there already
            return name if ".cuda." in name else name.replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def _nothing() -> Callable:
    """Stands for CUDA calls that have no meaning on the CPU.

    A function of its own for each: torch.compile looks them up by identity.
    """
    return lambda *_args, **_kwargs: None


class _Stream:
    """A stream and an event of the CPU, where all is done that was asked for."""

    wait_stream = wait_event = wait = synchronize = _nothing()

    def record_event(self, *_: object) -> _Stream:
        return self


_PATCHES: dict[str, Callable] = {
    "torch.cuda.current_device": lambda: "cpu",
    "torch.cuda.device_count": lambda: 1,
    "torch.cuda.set_device": _nothing(),
    "torch.cuda.synchronize": _nothing(),
    "torch.cuda.empty_cache": _nothing(),
    # Reducing gradients, megatron-core 0.19 waits for what CUDA graphs may still compute; the
    # optimizer in host memory copies on streams of its own.
    "torch.cuda.current_stream": lambda *_: _Stream(),
    "torch.cuda.Stream": lambda *_, **__: _Stream(),
    "torch.cuda.stream": lambda _: contextlib.nullcontext(),
    # Recomputation saves and restores the CUDA generator beside the CPU's.
    "megatron.core.tensor_parallel.random._get_cuda_rng_state": _nothing(),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": _nothing(),
    # Keeps dropout apart between ranks; these models have no dropout.
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork": (
        lambda *_, **__: contextlib.nullcontext()
    ),
}
# Called inside ``cpu_device``, but nothing in it names a device.
_FULL_SPEED = ("megatron.core.pipeline_parallel.schedules.backward_step",)


class Patches:
    """Puts replacements in the places of functions, for as long as any thread asks for it.

    Args:
        make: gives them, by dotted name of a module's function, or of a class's in a module. Called
            once, when they are first needed: it may import what is slow to import.
    """

    def __init__(self, make: Callable[[], dict[str, Callable]]) -> None:
        self._make = make
        self._originals: list[tuple[Any, str, Any]] = []
        self._depth = 0
        self._lock = threading.Lock()

    @functools.cached_property
    def _places(self) -> list[tuple[Any, str, Callable]]:
        return [(*_place(name), value) for name, value in self._make().items()]

    def __enter__(self) -> None:
        with self._lock:
            places = self._places
            self._depth += 1
            if self._depth == 1:
                self._originals = [(at, name, getattr(at, name)) for at, name, _ in places]
                for at, name, replacement in places:
                    setattr(at, name, replacement)

    def __exit__(self, *_error: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                for at, name, original in self._originals:
                    setattr(at, name, original)


def _place(dotted: str) -> tuple[Any, str]:
    """The module or class that holds what a dotted name means, and the name in it."""
    path, _, name = dotted.rpartition(".")
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        module, _, holder = path.rpartition(".")
        return getattr(importlib.import_module(module), holder), name


def _at_full_speed(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with plain_torch():
            return function(*args, **kwargs)

    return call


def _schedule_patches() -> dict[str, Callable]:
    return {name: _at_full_speed(getattr(*_place(name))) for name in _FULL_SPEED}


_CUDA = Patches(lambda: _PATCHES)
_SCHEDULES = Patches(_schedule_patches)


@contextlib.contextmanager
def cuda_calls_mean_cpu() -> Iterator[None]:
    """The cheap half of ``cpu_device``: CUDA functions only, tensor creation is not intercepted.

    Enough for forward passes under sequence parallelism, which ask for the current device.
    """
    if torch.cuda.is_available():
        yield
        return
    with _CUDA:
        yield


@contextlib.contextmanager
def cpu_device() -> Iterator[None]:
    """Megatron's CUDA calls mean the CPU inside; nothing at all happens where CUDA exists."""
    if torch.cuda.is_available():
        yield
        return
    with _CUDA, _SCHEDULES, _CudaMeansCpu():
        yield


def plain_torch() -> contextlib.AbstractContextManager:
    """Leaves the interception of ``cpu_device`` for a forward pass (full speed)."""
    if torch.cuda.is_available():
        return contextlib.nullcontext()
    return torch._C.DisableTorchFunction()
