"""The optimizer in host memory: megatron-core's ``HybridDeviceOptimizer``.

Flows in: a run's settings, and Megatron's distributed optimizer as it was built with them. Flows
out: its inner optimizers, which update float32 copies of the weights, on the CPU those that are
offloaded, and send them back. An optimizer without offloading is its own inner one.

What Megatron's leaves open and this file closes: state before the first step (made here, not by a
step on random gradients, which would move the weights), weights that are float32 themselves, and
two streams that its step does not wait for.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cosmos_posttrain.training.optimizer_config import OptimizerConfig


def configure(megatron: MegatronOptimizerConfig, settings: OptimizerConfig) -> None:
    """Asks Megatron for it, where the run does."""
    if not settings.cpu_offload:
        return
    megatron.optimizer_cpu_offload = True
    megatron.optimizer_offload_fraction = settings.offloaded_share
    megatron.overlap_cpu_optimizer_d2h_h2d = True
    megatron.pin_cpu_grads = torch.cuda.is_available()
    # Megatron takes float32 copies of pinned weights, which are not pinned.
    megatron.pin_cpu_params = False
    # The GPU then holds no float32 weights; gradients are ``decoupled_grad``. Not through the
    # constructor, whose checks ask for a version of Transformer Engine although none is used.
    megatron.use_precision_aware_optimizer = True
    megatron.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    megatron.store_param_remainders = False


class _HostAndDevice(TorchFunctionMode):
    """On the CPU: a tensor counts as one of a GPU until ``Tensor.cpu`` has made a copy of it."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return not getattr(args[0], "is_on_host", False)
        if func is torch.Tensor.pin_memory:
            return args[0]
        result = func(*args, **(kwargs or {}))
        is_on_host = getattr(args[0] if args else None, "is_on_host", False)
        if func is torch.Tensor.cpu:
            result, is_on_host = result.clone(), True
        if is_on_host and isinstance(result, Tensor):
            result.is_on_host = True  # type: ignore[attr-defined]
        return result


@contextlib.contextmanager
def building(settings: OptimizerConfig) -> Iterator[None]:
    """Around the building of Megatron's optimizer."""
    with contextlib.ExitStack() as stack:
        if settings.cpu_offload:
            stack.enter_context(torch.no_grad())  # ranges of float32 weights must be leaves
            if not torch.cuda.is_available():
                stack.enter_context(_HostAndDevice())
        yield
    if settings.cpu_offload:
        gc.collect()  # what Megatron made of the undivided weights first


def is_offloaded(optimizer: Any) -> bool:
    """Whether it keeps state in host memory."""
    return isinstance(optimizer, HybridDeviceOptimizer)


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Those that update numbers: of an offloaded one, one for each parameter on the CPU."""
    return list(optimizer.sub_optimizers) if is_offloaded(optimizer) else [optimizer]


def main_of(optimizer: Any, parameter: Tensor) -> Tensor:
    """What is updated in the place of a parameter of one of the optimizer's groups."""
    if not is_offloaded(optimizer):
        return parameter
    main: Tensor = optimizer.param_to_inner_param[parameter]
    return main


def parameter_of(optimizer: Any, main: Tensor) -> Tensor:
    """The inverse of ``main_of``."""
    if not is_offloaded(optimizer):
        return main
    parameter: Tensor = optimizer.inner_param_to_orig_param[main]
    return parameter


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The gradient of a parameter of one of the optimizer's groups, made ready for an update."""
    gradient: Tensor | None = getattr(parameter, "decoupled_grad", parameter.grad)
    return gradient


def forget_gradients(optimizer: Any) -> None:
    """Lets go of what lies on the GPU; of gradients in bfloat16 that is a float32 copy."""
    groups = [optimizer]
    if is_offloaded(optimizer) and optimizer.gpu_optimizer is not None:
        groups.append(optimizer.gpu_optimizer)
    for group in (group for each in groups for group in each.param_groups):
        for parameter in group["params"]:
            parameter.grad = None
            if hasattr(parameter, "decoupled_grad"):
                parameter.decoupled_grad = None


def plain_settings(optimizer: Any) -> list[dict[str, Any]]:
    """The parameter groups without parameters, and without what only offloading needs."""
    own = {"params"}
    if is_offloaded(optimizer):
        own |= optimizer.defaults.keys() - optimizer.sub_optimizer_kwargs.keys()
    return [
        {key: value for key, value in group.items() if key not in own}
        for group in optimizer.param_groups
    ]


def follow_weights(optimizer: Any) -> None:
    """Copies those weights that are float32 themselves to where they are updated.

    Megatron's ``reload_model_params`` does so for weights of less precision alone.
    """
    if is_offloaded(optimizer):
        for parameter, copy in optimizer.gpu_params_map_cpu_copy.items():
            if parameter.dtype == torch.float32:
                copy.data.copy_(parameter.data)


def order_streams(optimizer: Any) -> None:
    """Adds to each step what Megatron's own does not wait for, or does not hand on.

    megatron-core 0.15 lets the default stream go on before the weights are back. In all versions
    the weights that stay on the GPU are updated without waiting for float32 copies of their
    gradients, and not at all where they are float32 themselves.
    """
    if not is_offloaded(optimizer):
        return

    def before_gpu_step(gpu_optimizer: Any, *_: Any) -> None:
        torch.cuda.current_stream().wait_stream(optimizer._d2h_stream)
        for group in gpu_optimizer.param_groups:
            for parameter in group["params"]:
                if parameter_of(optimizer, parameter) is parameter:
                    parameter.grad = gradient_of(parameter)

    def after_step(*_: Any) -> None:
        torch.cuda.current_stream().wait_stream(optimizer._h2d_stream)

    if optimizer.gpu_optimizer is not None:
        optimizer.gpu_optimizer.register_step_pre_hook(before_gpu_step)
    optimizer.register_step_post_hook(after_step)
