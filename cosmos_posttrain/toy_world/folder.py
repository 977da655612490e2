"""The output folder of a small world: whose it is, what is done, and when it is complete.

Flows in: the plan of this run. Flows out: refusals, and the clips still to do. ``plan.json`` says
what is being rendered; at the end ``world.json``, the same, takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_posttrain import files
from cosmos_posttrain.errors import DatasetError, OutputFolderError
from cosmos_posttrain.evaluation.world_truth import truth_path

WORLD_FILE, PLAN_FILE, PROMPTS = "world.json", "plan.json", "prompts"
FOLDERS = ("videos", "annotation", "truth")


class ClipId(NamedTuple):
    """A clip of a world."""

    split: str
    number: int

    @property
    def name(self) -> str:
        """As in paths."""
        return f"{self.number:06d}"

    @property
    def video(self) -> str:
        """Relative to the world's folder."""
        return f"videos/{self.split}/{self.name}/rgb.mp4"

    @property
    def annotation(self) -> str:
        """Likewise."""
        return f"annotation/{self.split}/{self.name}.json"


def _is_ours(name: str) -> bool:
    return name in (*FOLDERS, WORLD_FILE, PLAN_FILE) or name.startswith(PROMPTS)


class WorldFolder:
    """One world's folder.

    Args:
        path: where it is.
        plan: ``version``, ``seed``, ``settings``, and the ``counts`` of clips by split.
    """

    def __init__(self, path: Path, plan: dict[str, Any]) -> None:
        self.path = path
        self.plan: dict[str, Any] = json.loads(files.json_text(plan))  # lists for tuples

    def check(self, overwrite: bool) -> None:
        """Refuses a folder that holds anything else than this world, or more of it.

        Changes nothing.

        Raises:
            OutputFolderError: names what it holds.
            DatasetError: its plan is damaged.
        """
        files.check_writable(self.path)
        foreign = files.foreign_names(self.path, _is_ours)
        if not any((self.path / name).is_file() for name in (WORLD_FILE, PLAN_FILE)):
            # Robot data, say, has folders of the same names.
            foreign = foreign or files.foreign_names(self.path, lambda name: False)
        if foreign:
            raise OutputFolderError(
                f"the output folder {self.path} holds something else ({foreign[0]}); name a new or "
                "empty folder."
            )
        for theirs in () if overwrite else self._plans():
            if difference := self._difference(theirs):
                raise OutputFolderError(
                    f"the output folder {self.path} holds another small world ({difference}); name "
                    "another folder, or start anew with --overwrite."
                )

    def _plans(self) -> list[dict[str, Any]]:
        """What the folder says of itself."""
        paths = [self.path / name for name in (WORLD_FILE, PLAN_FILE)]
        fix = "start anew with --overwrite"
        return [files.read_json(path, DatasetError, fix) for path in paths if path.is_file()]

    def _difference(self, theirs: dict[str, Any]) -> str | None:
        """What differs first; more clips of the same world are no difference."""
        ours = self.plan | self.plan["settings"]
        settings = theirs.get("settings")
        others = theirs | (settings if isinstance(settings, dict) else {})
        for key in ("version", "seed", *self.plan["settings"]):
            if ours[key] != others.get(key):
                return f"{key} {ours[key]} here, {others.get(key)} there"
        there = theirs.get("counts")
        for split, number in self.plan["counts"].items():
            found = there.get(split, 0) if isinstance(there, dict) else 0
            if found > number:
                return f"{number} clips for {split} here, {found} there"
        return None

    def is_complete(self) -> bool:
        """Whether it holds this world with all its clips."""
        return (self.path / WORLD_FILE).is_file() and self._plans() == [self.plan]

    def remove(self) -> None:
        """Removes an earlier world; killed in between, the folder is still known as one."""
        if (self.path / WORLD_FILE).is_file():
            (self.path / WORLD_FILE).replace(self.path / PLAN_FILE)
        for name in FOLDERS:
            files.remove(self.path / name)
        for path in self.path.glob(f"{PROMPTS}*"):
            path.unlink()
        (self.path / PLAN_FILE).unlink(missing_ok=True)

    def start(self) -> None:
        """From here on the folder is this world, and not complete."""
        files.remove_leftovers(self.path)
        files.write_json(self.path / PLAN_FILE, self.plan)
        (self.path / WORLD_FILE).unlink(missing_ok=True)
        for split in self.plan["counts"]:
            for name in FOLDERS:
                (self.path / name / split).mkdir(parents=True, exist_ok=True)
                files.remove_leftovers(self.path / name / split)

    def missing(self, clips: Sequence[ClipId]) -> list[ClipId]:
        """Clips of which a file is not there yet; the annotation is written last."""
        return [
            clip
            for clip in clips
            if not (self.path / clip.annotation).is_file()
            or not (self.path / clip.video).is_file()
            or not truth_path(self.path / clip.video).is_file()
        ]

    def finish(self) -> None:
        """Makes the folder complete."""
        files.write_json(self.path / WORLD_FILE, self.plan)
        (self.path / PLAN_FILE).unlink(missing_ok=True)
