"""What stands between matrix products and attention, compiled by torch.compile where asked for.

Flows in: functions of tensors in plain torch, marked ``compilable``. Flows out: the same, each one
kernel (C++ on the CPU, Triton on a GPU) that reads its inputs once. Sums are taken in another order
than without it: numbers differ in their last bits.

Where it is off, models use steps of autograd of their own, which pass over pieces that stay in a
core's cache; see ``blocks``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from cosmos_posttrain import launch
from cosmos_posttrain.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")
_is_on = False


def compile_models(on: bool) -> None:
    """Says whether models that are in training are compiled, from their next step on.

    Raises:
        ConfigError: nothing on this machine can compile.
    """
    global _is_on
    if on:
        _check_compiler()
    _is_on = on


def is_on() -> bool:
    """Whether models in training are compiled."""
    return _is_on


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function when it is first called, for the shapes of each call."""
    compiled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(function, dynamic=False)
        return compiled(*args, **kwargs)

    return call


def _check_compiler() -> None:
    """Compiles a function of one line: what may be missing is found in no other way."""
    from torch._inductor import config

    # These kernels are few and small: processes that compile beside each rank cost more.
    config.compile_threads = 1
    try:
        with torch.no_grad():
            torch.compile(_try, dynamic=False)(torch.ones(64, device=launch.device()))
    except Exception as error:  # torch, Triton and the compiler each have their own
        needed = "Triton and a C compiler" if torch.cuda.is_available() else "a C++ compiler (g++)"
        reason = next((line for line in reversed(str(error).splitlines()) if "rror:" in line), "")
        raise ConfigError(
            f"--compile needs {needed} with Python's headers, and here nothing can be compiled "
            f"({reason.strip() or type(error).__name__}): install them, or leave --compile out."
        ) from error


def _try(x: torch.Tensor) -> torch.Tensor:
    return (x + 1) * x
