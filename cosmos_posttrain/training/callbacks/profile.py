"""Some steps of a run under torch's profiler, and of a GPU what lay in its memory meanwhile.

Flows out, of each rank: ``profile/steps=A-B.rank=R.pt.trace.json``, for TensorBoard's profiler
plugin, Perfetto or chrome://tracing, and on a GPU ``...memory.pickle``, for pytorch.org/memory_viz.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from cosmos_posttrain import files, launch
from cosmos_posttrain.training.callbacks.base import Callback, Row, Run
from cosmos_posttrain.training.watching_config import parse_profile_steps

FOLDER = "profile"
_MAX_EVENTS = 200_000  # of the memory's history


class Profile(Callback):
    """Comes last, so that what it shows of a step begins with it, callbacks behind it included.

    Args:
        steps: first and last step, as 10-12.
        folder: ``LOG_DIR/default``.
        next_step: number of the step that comes next.
    """

    def __init__(self, steps: str, folder: Path, next_step: int) -> None:
        self._steps, self._folder = parse_profile_steps(steps), folder / FOLDER
        self._profiler: profile | None = None
        self._begin(next_step)
        if next_step > self._steps[0]:
            launch.say(f"note: step {self._steps[0]} is behind this run: nothing is profiled.")

    def after_step(self, run: Run, row: Row) -> None:
        if self._profiler is not None and (
            run.completed_steps > self._steps[-1] or run.is_last_step
        ):
            self._end(self._profiler)
        self._begin(run.completed_steps)

    def _begin(self, next_step: int) -> None:
        if next_step != self._steps[0] or self._profiler is not None:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MAX_EVENTS)
        self._profiler = profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def _end(self, profiler: profile) -> None:
        self._profiler = None
        profiler.stop()
        name = f"steps={self._steps[0]}-{self._steps[-1]}.rank={launch.rank()}"
        try:
            self._folder.mkdir(exist_ok=True)
            with files.replacing(self._folder / f"{name}.pt.trace.json") as temporary:
                # The profiler writes beside it, and says nothing where that fails.
                beside = temporary.with_name(f"{temporary.name}.tmp")
                try:
                    profiler.export_chrome_trace(str(temporary))
                finally:
                    beside.unlink(missing_ok=True)
            if torch.cuda.is_available():
                with files.replacing(self._folder / f"{name}.memory.pickle") as temporary:
                    torch.cuda.memory._dump_snapshot(str(temporary))
        except OSError as error:  # a full disk: the run's checkpoints will say so, if they matter
            launch.say(f"warning: no profile was written: {error}", error=True)
            return
        finally:
            _forget_memory()
        launch.say(f"profiled steps {self._steps[0]} to {self._steps[-1]}: {self._folder}")

    def close(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            _forget_memory()


def _forget_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(enabled=None)
