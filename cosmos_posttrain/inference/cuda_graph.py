"""A static step as CUDA graphs: recorded once for each window and bucket, then replayed.

Flows in: a step of ``static_step.py``. Flows out: the same step, which costs the host one call.
A step runs as it is until its kernels are loaded and its memory is known, then it is recorded. What
cannot be recorded (another program's stream, a collective of another kind than NCCL's) runs as it
is from then on, and one sentence says so.
"""

from __future__ import annotations

from collections import Counter

import torch

from cosmos_posttrain import launch
from cosmos_posttrain.inference.static_step import Runner

# Runs of a step before it is recorded.
_NUM_WARM = 2


class CudaGraphs:
    """Runs a step of (window, blocks), see ``Runner``; all tensor-parallel ranks alike.

    Args:
        step: works in place, at the same addresses each time.
    """

    def __init__(self, step: Runner) -> None:
        self._step = step
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._num_runs: Counter[tuple[int, int]] = Counter()
        self._is_refused = False

    def __call__(self, count: int, num_blocks: int) -> None:
        """Runs the step, or replays it."""
        key = count, num_blocks
        if key not in self._graphs and not self._is_refused and self._num_runs[key] >= _NUM_WARM:
            self._record(key)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        self._num_runs[key] += 1
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._step(*key)
        current.wait_stream(self._stream)

    def _record(self, key: tuple[int, int]) -> None:
        """Recording does nothing but record: the step has yet to run."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: NCCL's watchdog asks for its events meanwhile.
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            ):
                self._step(*key)
        except RuntimeError as error:
            self._is_refused = True
            say_refused(str(error))
        else:
            self._graphs[key] = graph


def say_refused(error: str) -> None:
    """One sentence, from one rank."""
    reason = error.strip().split("\n", 1)[0].rstrip(".")
    launch.say(
        f"CUDA graphs are not used, tokens are decoded without: {reason}; --no-cuda_graphs leaves "
        "them out.",
        error=True,
    )
