"""What the other commands of evaluate.py have measured, found and read.

Flows in: their ``metrics.json``. Flows out: ``Evaluation``s of one shape. Values may be anything
that JSON can hold: whoever shows them looks at their kind first.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cosmos_posttrain import files
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.evaluation.report.curves import is_number
from cosmos_posttrain.evaluation.report.runs import ReportedRun
from cosmos_posttrain.evaluation.result_folder import METRICS_FILE

_NO_EVALUATIONS = {"checkpoints", "tb_logs", "wandb", "clips", "samples", "profile"}
_FIX = "evaluate again, or leave it out"
_USUAL = Path("evaluation")


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation.

    Attributes:
        path: its ``metrics.json``.
        name: what it is called on the page.
        command: of evaluate.py.
        settings: all that decides the figures.
        figures: over everything.
        rows: one object a clip.
        failures: what could not be evaluated, or was flagged, one object each.
        environment: what it ran on.
        seconds: that it took; None where that was not recorded.
    """

    path: Path
    name: str
    command: str
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def folder(self) -> Path:
        """Where its clips lie."""
        return self.path.parent


def find_evaluations(runs: list[ReportedRun], named: list[str]) -> list[Evaluation]:
    """Reads the evaluations that were named, or all that there are of these runs.

    They are looked for in the run folders, and in ``evaluation`` in the current folder, where the
    other commands write unless they are told otherwise: there, those whose settings name a path in
    a run folder.

    Raises:
        ConfigError: one that was named is none, or damaged.
    """
    if named:
        paths = [_metrics_file(Path(name)) for name in named]
        found = []
        for path in dict.fromkeys(paths):
            evaluation = _read(path)
            if evaluation is None:
                raise ConfigError(
                    f"--evaluation {path} is no result of an evaluation (it names no command); "
                    "name the output folder of a command of evaluate.py."
                )
            found.append(evaluation)
        return _named(found, runs)
    below = [path for run in runs for path in _metrics_below(run.folder)]
    beside = [path for path in _metrics_below(_USUAL) if path not in below]
    read = [_read(path) for path in below]
    read += [item for path in beside if (item := _read(path)) and _is_of(item, runs)]
    return _named([item for item in read if item is not None], runs)


def _metrics_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not (path / METRICS_FILE).is_file():
        raise ConfigError(
            f"--evaluation {path} holds no {METRICS_FILE}; name the output folder of a finished "
            "evaluation."
        )
    return path / METRICS_FILE


def _metrics_below(folder: Path) -> list[Path]:
    """All ``metrics.json`` of evaluations in a run folder; those of checkpoints are none."""
    found = []
    for parent, names, filenames in os.walk(folder):
        names[:] = sorted(n for n in names if n not in _NO_EVALUATIONS and not n.startswith("."))
        if METRICS_FILE in filenames:
            found.append(Path(parent) / METRICS_FILE)
    return found


def _read(path: Path) -> Evaluation | None:
    """One evaluation; None for a file of another kind."""
    values = files.read_json(path, ConfigError, _FIX)
    settings = _dict(values.get("settings"))
    command = values.get("command") or settings.get("command")
    if not isinstance(command, str):
        return None
    # Of the first evaluations, figures stood beside the settings.
    figures = values.get("figures") or {
        key: value
        for key, value in values.items()
        if is_number(value) and key not in ("seconds", "num_failures")
    }
    seconds = values.get("seconds")
    return Evaluation(
        path=path,
        name=path.resolve().parent.name if path.name == METRICS_FILE else path.stem,
        command=command,
        settings=settings,
        figures=_dict(figures),
        rows=_dicts(values.get("rows") or values.get("videos")),
        failures=_dicts(values.get("failures")),
        environment=_dict(values.get("environment") or values.get("measured_with")),
        seconds=float(seconds) if is_number(seconds) else None,
    )


def _is_of(evaluation: Evaluation, runs: list[ReportedRun]) -> bool:
    return any(_belongs(evaluation, run) for run in runs)


def _belongs(evaluation: Evaluation, run: ReportedRun) -> bool:
    """Whether it lies in the run folder, or its settings name a path in there."""
    folder = run.folder.resolve()
    values = [value for value in evaluation.settings.values() if isinstance(value, str)]
    paths = [evaluation.path.resolve(), *(Path(value).absolute() for value in values)]
    return any(path.is_relative_to(folder) for path in paths)


def _named(evaluations: list[Evaluation], runs: list[ReportedRun]) -> list[Evaluation]:
    """Each called after its run, as far as that tells it from the others of its command."""
    named = []
    for item in evaluations:
        run = next((run for run in runs if _belongs(item, run)), None)
        named.append(item if run is None else replace(item, name=run.name))
    taken = Counter((item.command, item.name) for item in named)
    return [
        replace(new, name=f"{new.name}, {old.name}") if taken[new.command, new.name] > 1 else new
        for old, new in zip(evaluations, named, strict=True)
    ]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
