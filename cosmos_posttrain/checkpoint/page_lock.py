"""Host memory that a GPU copies into directly, for as long as it is held.

Flows in: memory, and CUDA's runtime. Flows out: whether it is page-locked. A refusal costs speed
only: CUDA keeps it as its last error, for which the next kernel of the process would be blamed, so
it is taken from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import launch


def _run_kernel() -> None:
    torch.ones(1, device=launch.device()).add_(1)


class PageLock:
    """Holds memory page-locked until it is released.

    Args:
        memory: on the CPU; nothing is done where it is empty.
        runtime: ``torch.cuda.cudart()``.
        run_kernel: anything behind which torch looks at CUDA's last error.

    Attributes:
        is_held: whether it is page-locked.
    """

    def __init__(
        self, memory: Tensor, runtime: Any, run_kernel: Callable[[], None] = _run_kernel
    ) -> None:
        self.is_held = False
        self._memory, self._runtime, self._run_kernel = memory, runtime, run_kernel
        if not memory.nbytes:  # which CUDA calls a mistake
            return
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        self.is_held = code == 0
        if not self.is_held:
            self._forget_error()
            launch.say(
                f"note: {memory.nbytes / 1e9:.1f} GB of host memory could not be page-locked (CUDA "
                f"error {code}), so that copying a checkpoint into it takes longer."
            )

    def release(self) -> None:
        """Makes it ordinary memory again; safe to call twice."""
        if self.is_held:
            self.is_held = False
            if int(self._runtime.cudaHostUnregister(self._memory.data_ptr())):
                self._forget_error()

    def _forget_error(self) -> None:
        """Torch looks at the last error behind each kernel, which clears it, and raises it."""
        with contextlib.suppress(RuntimeError):
            self._run_kernel()
