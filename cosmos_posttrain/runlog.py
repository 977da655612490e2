"""What a long job says while it runs: a progress display, metrics.jsonl, TensorBoard and W&B.

Flows in: counts of finished work, and rows of numbers. Flows out: rate and time left on standard
error; the same numbers in every place. Only rank 0 says and writes anything.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cosmos_posttrain import files, launch
from cosmos_posttrain.config import to_dict
from cosmos_posttrain.errors import ConfigError, SaveError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TERMINAL_SECONDS, _LOG_SECONDS = 0.25, 5.0
_WANDB_OFF = "disabled"
METRICS_FILE = "metrics.jsonl"


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class ProgressDisplay:
    """Rate and time left: one line, rewritten on a terminal, written now and then in a log.

    Args:
        total: how much there is to do.
        unit: what is counted, in the plural.
        label: what the line begins with.
        done: how much an earlier process has done, which does not count for the rate.
        stream: standard error unless given.
        log_seconds: time between two lines where the stream is no terminal.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        label: str = "",
        done: int = 0,
        stream: TextIO | None = None,
        log_seconds: float = _LOG_SECONDS,
    ) -> None:
        self.total, self.done = total, done
        self._unit, self._prefix = unit, f"{label}: " if label else ""
        self._stream = stream or sys.stderr
        self._is_active = launch.is_rank_zero()
        self._is_terminal = self._stream.isatty()
        self._pause_seconds = _TERMINAL_SECONDS if self._is_terminal else log_seconds
        self._first, self._start = done, time.monotonic()
        self._last = self._start

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    @property
    def seconds_left(self) -> float:
        """At that rate."""
        return (self.total - self.done) / self.rate if self.rate else 0.0

    def advance(self, note: str = "", count: int = 1) -> None:
        """``count`` more are done; see ``show``."""
        self.show(self.done + count, note)

    def show(self, done: int, note: str = "", force: bool = False) -> None:
        """``done`` in all are done.

        Args:
            done: of the total.
            note: further words for the line.
            force: write the line however short ago the last one was.
        """
        self.done = done
        now, is_end = time.monotonic(), done >= self.total
        is_due = is_end or force or now - self._last >= self._pause_seconds
        if not (self._is_active and is_due):
            return
        self._last = now
        rate = f"{self.rate:,.1f}" if self.rate >= 10 else f"{self.rate:.2f}"
        parts = [f"{done:,}/{self.total:,} {self._unit}", note, f"{rate} {self._unit}/s"]
        if is_end:
            parts.append(f"{duration(now - self._start)} in all")
        elif self.rate > 0:
            parts.append(f"{duration(self.seconds_left)} left")
        self._write(self._prefix + ", ".join(part for part in parts if part), is_end)

    def say(self, text: str) -> None:
        """Writes a line of its own, which the display does not run into."""
        if self._is_active:
            start = "\r\x1b[K" if self._is_terminal else ""
            self._stream.write(f"{start}{text}\n")
            self._stream.flush()

    def _write(self, line: str, is_end: bool) -> None:
        if self._is_terminal:
            if not is_end:  # a wrapped line could not be rewritten
                columns = os.get_terminal_size(self._stream.fileno()).columns or 80
                line = line[: columns - 1]
            line = f"\r{line}\x1b[K"
        self._stream.write(line + ("\n" if is_end or not self._is_terminal else ""))
        self._stream.flush()
        launch.hold_line(self._stream if self._is_terminal and not is_end else None)


class RunLog:
    """Writes rows of numbers to every place; on other ranks than 0 it does nothing.

    Args:
        folder: gets ``metrics.jsonl`` and ``tb_logs/``.
        config: a structured config, recorded in W&B.
        completed_steps: steps of the run so far; later rows that are there already are dropped, so
            that each step appears once.
        has_boards: TensorBoard and W&B too; else somebody else feeds them.

    Attributes:
        last_step: number of the last row that was there before; None where there was none, and on
            other ranks than 0.

    Raises:
        ConfigError: the environment asks for W&B, but wandb is not installed.
    """

    def __init__(
        self, folder: Path, config: object, completed_steps: int, has_boards: bool = True
    ) -> None:
        self._is_active = launch.is_rank_zero()
        self._tensorboard_is_off = not has_boards
        self._wandb: Any = None
        self.last_step: int | None = None
        if not self._is_active:
            return
        path = folder / METRICS_FILE
        if path.is_file():
            rows = [row for row in read_rows(path) if row["step"] < completed_steps]
            files.write_json_lines(path, rows)
            self.last_step = rows[-1]["step"] if rows else None
        self._file = path.open("a", encoding="utf-8")
        if has_boards:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tb_logs"), purge_step=completed_steps)
            self._wandb = start_wandb(config, folder)

    def write(self, row: dict[str, Any]) -> None:
        """Records a row, whose ``step`` counts from 0; curves are made of its numbers."""
        if not self._is_active:
            return
        try:
            self._file.write(files.json_text(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise SaveError(
                f"{self._file.name} cannot be written ({error.strerror or error}); make room, then "
                "give the same command again."
            ) from error
        numbers = {
            key: value
            for key, value in row.items()
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        self._show(lambda board: [board.add_scalar(k, v, row["step"]) for k, v in numbers.items()])
        if self._wandb is not None:
            self._wandb.log(numbers, step=row["step"])

    def write_picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Records a picture, (H, W, 3) uint8, in TensorBoard and W&B."""
        if not self._is_active:
            return
        self._show(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(pixels)}, step=step)

    def write_video(
        self, name: str, path: Path, gif: bytes, size: tuple[int, int], step: int
    ) -> None:
        """Records a video in TensorBoard and W&B.

        Args:
            name: of the video.
            path: the video as an mp4 file, for W&B, which copies it.
            gif: the same as TensorBoard shows it, an animated picture.
            size: (height, width) of the picture.
            step: counts from 0.
        """
        if not self._is_active:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        # What add_video writes, which would need moviepy for it.
        image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._show(lambda board: board._get_file_writer().add_summary(summary, step))
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Video(str(path))}, step=step)

    def _show(self, write: Callable[[Any], object]) -> None:
        """A full disk ends TensorBoard's curves, since its writer never recovers; not the run."""
        if self._tensorboard_is_off:
            return
        try:
            write(self._tensorboard)
        except OSError as error:
            self._tensorboard_is_off = True
            say_tensorboard_ends(error.strerror or str(error))

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._is_active:
            with contextlib.suppress(OSError):  # a full disk, and a half-written last row
                self._file.close()
            self._show(lambda board: board.close())
            if self._wandb is not None:
                self._wandb.finish()


def say_tensorboard_ends(reason: str) -> None:
    """Warns of curves that end before the run does.

    Args:
        reason: what the system said.
    """
    launch.say(
        f"warning: nothing more for TensorBoard in this launch ({reason}); {METRICS_FILE} has "
        "every number.",
        error=True,
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a line that was left half-written is left out."""
    return list(iter_rows(path))


def iter_rows(path: Path) -> Iterator[dict[str, Any]]:
    """``read_rows``, one at a time."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, KeyError, TypeError):
                continue
            yield row


def wants_wandb() -> bool:
    """True where the environment asks for W&B: ``WANDB_API_KEY`` or ``WANDB_MODE``, not disabled.

    Raises:
        ConfigError: it asks, but wandb is not installed.
    """
    mode = os.environ.get("WANDB_MODE", "")
    if mode.lower() == _WANDB_OFF or not (os.environ.get("WANDB_API_KEY") or mode):
        return False
    if find_spec("wandb") is None:
        raise ConfigError(
            "WANDB_API_KEY or WANDB_MODE is set, but wandb is not installed; pip install wandb, or "
            "set WANDB_MODE=disabled."
        )
    return True


def start_wandb(config: object | None, folder: Path) -> Any:
    """The W&B run of a folder, a new one or the one that it had before.

    Args:
        config: a structured config, recorded there; None leaves what is recorded.
        folder: the run's.

    Returns:
        A ``wandb`` run, offline where W&B cannot be reached or refuses the key; None where the
        environment asks for none.

    Raises:
        ConfigError: see ``wants_wandb``.
    """
    if not wants_wandb():
        return None
    import wandb

    # One W&B run per folder, so that a resumed run goes on in the same curves.
    id_file = folder / "wandb_id.txt"
    if not id_file.is_file():
        files.write_text(id_file, secrets.token_hex(4))
    settings: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "cosmos_posttrain"),
        "name": os.environ.get("WANDB_NAME", _run_name(folder)),
        "id": id_file.read_text(encoding="utf-8").strip(),
        "resume": "allow",
        "dir": str(folder),
        "config": None if config is None else to_dict(config),
    }
    try:
        return wandb.init(**settings)
    except wandb.errors.Error as error:
        said = " ".join(str(error).split()).rstrip(".")
        launch.say(
            f"warning: W&B did not take the run ({said}); it is recorded in "
            f"{folder / 'wandb'} instead: wandb sync sends it.",
            error=True,
        )
        wandb.teardown()  # which still holds the run's id
        return wandb.init(**settings, mode="offline")


def _run_name(folder: Path) -> str:
    """``L`` of the run folder ``L/default``, or of the folder ``L``."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "default" else folder.name
