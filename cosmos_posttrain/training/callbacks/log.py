"""The row of each step in metrics.jsonl, TensorBoard and W&B, and a progress line."""

from __future__ import annotations

from pathlib import Path

from cosmos_posttrain.runlog import ProgressDisplay, RunLog
from cosmos_posttrain.training.callbacks.base import Callback, Row, Run
from cosmos_posttrain.training.config import TrainConfig


class Log(Callback):
    """Comes last, when the row is complete.

    Args:
        config: the run's config.
        folder: ``LOG_DIR/default``.
        completed_steps: steps that the run had when it was started or resumed.
        has_boards: feed TensorBoard and W&B too.

    Attributes:
        folder: the same.
        first_step: number of the first step that this process makes.
        last_step: number of the last row that was there before; None on other ranks than 0.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, completed_steps: int, has_boards: bool = True
    ) -> None:
        self.folder, self.first_step = folder, completed_steps
        self._log = RunLog(folder, config, completed_steps, has_boards)
        self.write_video = self._log.write_video
        self._progress = ProgressDisplay(config.max_steps, "steps", done=completed_steps)
        self.last_step = self._log.last_step

    def after_step(self, run: Run, row: Row) -> None:
        self._log.write(row)
        parts = [
            f"loss {_number(row['reduced_train_loss'], '.4f')}",
            f"lr {row['lr']:.2e}",
            f"grad norm {_number(row['grad_norm'], '.3f')}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
        if row.get("mfu") is not None:
            parts.append(f"MFU {row['mfu']:.1%}")
        if row.get("val_loss") is not None:
            parts.append(f"val loss {row['val_loss']:.4f}")
        done = row["step"] + 1
        self._progress.show(done, ", ".join(parts), force="val_loss" in row or run.is_last_step)

    def close(self) -> None:
        self._log.close()


def _number(value: float | None, form: str) -> str:
    """A number; of a skipped batch's, which was not finite, the row has none."""
    return "not finite" if value is None else format(value, form)
