"""What a callback is, and what it sees of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

Row = dict[str, Any]


class Run(Protocol):
    """What callbacks see of a run; ``training.trainer.Trainer`` is one."""

    stop_reason: str | None
    """Why the run ends before its last step; None while it goes on. Equal on all ranks."""

    @property
    def completed_steps(self) -> int:
        """Optimizer steps of the run so far."""
        ...

    @property
    def is_last_step(self) -> bool:
        """True after the last step, and where the run was asked to end."""
        ...

    def tell(self, place: str) -> None:
        """The loop goes on at a place within a callback; every rank tells the same in turn."""
        ...

    def skip_batch(self, row: Row) -> list[str]:
        """Goes on behind a batch that made no update, as if it had; names its clips.

        The row gets the new counts. The names are on rank 0 only.
        """
        ...

    def save(self, row: Row) -> Path:
        """Writes a checkpoint, or begins to; every rank takes part."""
        ...

    def poll_save(self) -> None:
        """Calls ``after_save`` for a checkpoint that is complete by now."""
        ...

    def record_validation(self, row: Row) -> None:
        """Adds the row's validation to the checkpoint of this step, if one was written."""
        ...


class Callback:
    """Something that happens after steps. Each hook does nothing unless it is overridden."""

    @property
    def state(self) -> dict[str, Any]:
        """Plain values that a resumed run needs; saved with every checkpoint."""
        return {}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        """Takes up what a checkpoint kept."""

    def after_step(self, run: Run, row: Row) -> None:
        """A step is complete; ``row``, what metrics.jsonl will have of it, may be added to."""

    def after_save(self, run: Run, checkpoint: Path) -> None:
        """A checkpoint is complete: at once, or a few steps after it was begun (``async_save``).

        All ranks are told at the same step.
        """

    def close(self) -> None:
        """The run has ended, in whatever way."""
