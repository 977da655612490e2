"""Weight gradients, added to Megatron's gradient buffers as they are computed.

Flows in: a layer's inputs and the gradients of its outputs. Flows out: the weight's gradient, in
``weight.main_grad`` where Megatron has given the weight a buffer, else as autograd wants it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_weight_gradient(inputs: Tensor, grads: Tensor, main_grad: Tensor) -> None:
    """Adds a weight's gradient to its buffer; what ``forget_gradients`` left there is replaced.

    Args:
        inputs: (N, in) of the layer.
        grads: (N, out) of its outputs.
        main_grad: (out, in).
    """
    is_old = getattr(main_grad, "is_old", False)
    main_grad.is_old = False  # type: ignore[attr-defined]
    if main_grad.dtype == inputs.dtype and is_old:
        torch.mm(grads.t(), inputs, out=main_grad)
    elif main_grad.dtype == inputs.dtype:
        main_grad.addmm_(grads.t(), inputs)
    elif is_old:
        main_grad.copy_(grads.t() @ inputs)
    else:
        main_grad.add_(grads.t() @ inputs)


class WeightGradient:
    """The gradient of one weight, from several parts of its layer's input.

    Args:
        weight: (out, in).
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._buffer: Tensor | None = getattr(weight, "main_grad", None)
        self._is_buffered = self._buffer is not None
        if self._buffer is None:
            self._buffer = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, inputs: Tensor, grads: Tensor) -> None:
        """Adds ``grads^T inputs``: (N, in) and (N, out)."""
        assert self._buffer is not None
        add_weight_gradient(inputs, grads, self._buffer)

    def result(self) -> Tensor:
        """What the backward pass returns; anything, where the buffer has it already."""
        assert self._buffer is not None
        if not self._is_buffered:
            return self._buffer.to(self._weight.dtype)
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(self._weight)
