"""What a step is measured by: norms, speed, memory and waiting.

Flows in: the loss and the optimizer of a step, and how long it took. Flows out: the numbers of its
row in metrics.jsonl; docs/training.md has a table of all. A GPU is asked once a step, for all
numbers together.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.inference.memory import peak_bytes
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.training.flops import flops_per_token, peak_flops
from cosmos_posttrain.training.norms import gradient_norms, parameter_norm

STEP_SECONDS = "train_step_timing in s"  # NeMo's name
# A pass over the weights, which one step in ten is little changed by.
PARAM_NORM_EVERY = 10
_WINDOW = 50  # steps that the jitter is taken over
_GIB = 2**30


class StepMeter:
    """Measures the steps of one launch of a run.

    Args:
        optimizer: Megatron's.
        model: the model's numbers.
        num_clips: of a global batch.
        num_tokens: of a clip.
        heads_alone: all but the Medusa heads is frozen.
    """

    def __init__(
        self,
        optimizer: Any,
        model: ModelConfig,
        num_clips: int,
        num_tokens: int,
        heads_alone: bool = False,
    ) -> None:
        self._optimizer = optimizer
        self._num_clips, self._num_tokens = num_clips, num_tokens
        self._flops_per_clip = flops_per_token(model, heads_alone) * num_tokens
        self._peak_flops = peak_flops_here()
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._num_steps = 0

    def fetch(self, step: int, loss: Tensor, waited_seconds: float) -> dict[str, float]:
        """Numbers that ranks or a GPU must be asked for, after the backward pass.

        This is the one moment of a step at which the CPU waits for the GPU.

        Args:
            step: counted from 0.
            loss: the step's, a scalar on the model's device.
            waited_seconds: of this rank, for its batch.
        """
        norms = gradient_norms(self._optimizer)
        found = {"reduced_train_loss": loss, "grad_norm": norms[0], "grad_norm_embedding": norms[1]}
        if step % PARAM_NORM_EVERY == 0:
            found["param_norm"] = parameter_norm(self._optimizer)
        found["data_wait_seconds"], memory = _largest(loss.device, waited_seconds, peak_bytes())
        found["peak_memory_gib"] = memory / _GIB
        values = torch.stack([value.float() for value in found.values()]).tolist()
        row = dict(zip(found, values, strict=True))
        if not row["peak_memory_gib"]:  # nobody tells
            del row["peak_memory_gib"]
        return row

    def speed(self, seconds: float, waited_seconds: float) -> dict[str, float | None]:
        """How fast a step was, and how even the last steps were.

        Args:
            seconds: of the step.
            waited_seconds: of this rank, for its batch; waiting for others is part of the step.
        """
        clips = self._num_clips / (seconds + waited_seconds)
        clips_each = clips / launch.world_size()
        flops_each = clips_each * self._flops_per_clip
        row: dict[str, float | None] = {
            STEP_SECONDS: seconds,
            "tokens_per_second": clips * self._num_tokens,
            "tokens_per_second_per_gpu": clips_each * self._num_tokens,
            "clips_per_second_per_gpu": clips_each,
            "TFLOPS_per_GPU": flops_each / 1e12,
            "mfu": None if self._peak_flops is None else flops_each / self._peak_flops,
        }
        self._num_steps += 1
        if self._num_steps > 1:  # the first one loads, compiles and allocates
            self._seconds.append(seconds)
            row["step_time_jitter"] = jitter(self._seconds)
        return row


def peak_flops_here() -> float | None:
    """FLOP/s of this process's GPU by its data sheet; None on the CPU, and where it is unknown."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def jitter(seconds: deque[float]) -> float:
    """95th percentile of some times over their median; 1 where all are the same."""
    slow = sorted(seconds)[round(0.95 * (len(seconds) - 1))]
    return slow / max(statistics.median(seconds), 1e-9)


def _largest(device: torch.device, *values: float) -> Tensor:
    """The largest of the ranks' numbers; a fill is a kernel's argument, so that nothing waits."""
    found = torch.stack([torch.full((), value, device=device) for value in values])
    if launch.world_size() > 1:
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return found
