"""The checkpoint that a run goes on from: the newest that is whole.

Flows in: a run folder. Flows out: its checkpoints, newest first, without those that are damaged,
which are moved aside once another one has been loaded. For the one rank that decides.

    LOG_DIR/default/damaged_checkpoints/epoch=E-step=S
"""

from __future__ import annotations

from pathlib import Path

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import context, damage
from cosmos_posttrain.errors import CheckpointError

FOLDER = "damaged_checkpoints"


class Candidates:
    """Checkpoints of a run, each offered once.

    Args:
        log_dir: the run folder.
    """

    def __init__(self, log_dir: Path) -> None:
        self._run = log_dir / "default"
        folder = self._run / "checkpoints"
        found = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
        whole = [p for p in found if context.completed_steps(p) and not context.is_unfinished(p)]
        self._left = sorted(whole, key=_step)
        self._damaged: list[tuple[Path, str]] = []

    def newest(self) -> Path | None:
        """The newest that is left and seems whole; None where the run has none at all.

        Raises:
            CheckpointError: none of them is whole.
            UnreadableCheckpointError: one cannot be read.
        """
        while self._left:
            checkpoint = self._left.pop()
            reason = damage.problem(checkpoint)
            if reason is None:
                return checkpoint
            self._damaged.append((checkpoint, reason))
        if not self._damaged:
            return None
        reason = self._damaged[0][1]
        raise CheckpointError(
            f"{reason.rstrip('.')}; the run has no other checkpoint that is whole. Nothing was "
            "changed."
        )

    def instead_of(self, checkpoint: Path, reason: str) -> Path:
        """The next one, where loading has found that an offered one is damaged.

        Raises:
            CheckpointError: there is none.
        """
        self._damaged.append((checkpoint, reason))
        other = self.newest()
        assert other is not None
        return other

    def set_aside(self, used: Path | None) -> None:
        """Moves the damaged ones out of the way and says so; the run has been loaded from another.

        Args:
            used: the one that it has been loaded from.
        """
        for checkpoint, reason in self._damaged:
            aside = self._run / FOLDER / checkpoint.name
            number = 1
            while aside.exists():
                number += 1
                aside = aside.with_name(f"{checkpoint.name}.{number}")
            aside.parent.mkdir(exist_ok=True)
            checkpoint.rename(aside)
            launch.say(
                f"warning: {checkpoint} is damaged and was moved to {aside.parent} ({reason}) The "
                f"run goes on from {used}.",
                error=True,
            )
        self._damaged.clear()


def _step(checkpoint: Path) -> int:
    return context.completed_steps(checkpoint)
