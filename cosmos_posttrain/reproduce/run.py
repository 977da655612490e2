"""Runs the commands of figures and compares what they print.

Flows in: figures and a folder. Flows out, a folder for each figure:

    OUTPUT/NAME/log.txt       what the command printed
    OUTPUT/NAME/result.json   its values, and whether they hold
    OUTPUT/NAME/output/       what the command wrote, where it takes a folder
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cosmos_posttrain
from cosmos_posttrain import files
from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError
from cosmos_posttrain.evaluation.environment import environment
from cosmos_posttrain.reproduce.config import ReproduceConfig
from cosmos_posttrain.reproduce.figures import Figure


def run(figures: Sequence[Figure], config: ReproduceConfig) -> list[dict[str, Any]]:
    """Remakes figures one after another and says of each value whether it holds.

    Returns:
        What the ``result.json`` of each holds.

    Raises:
        ConfigError: something is missing that a command needs; nothing was run.
        CosmosPosttrainError: a figure does not hold; all were run.
    """
    folder, repository = Path(config.output).absolute(), _repository()
    commands = [_command(figure, config, folder) for figure in figures]
    files.check_writable(folder)
    results = []
    with files.locked(folder, only=[figure.name for figure in figures]):
        for figure, command in zip(figures, commands, strict=True):
            results.append(_run_one(figure, command, folder / figure.name, repository))
    failed = [result["name"] for result in results if not result["holds"]]
    if failed:
        raise CosmosPosttrainError(
            f"{len(failed)} of {len(figures)} figures do not hold here: {', '.join(failed)}; see "
            f"the logs in {folder}."
        )
    print(f"all {len(figures)} figures hold here.", flush=True)
    return results


def _repository() -> Path:
    """The checkout that the package is run from.

    Raises:
        ConfigError: it is not run from one: recipes, benchmarks and tests are not installed.
    """
    folder = Path(cosmos_posttrain.__file__).resolve().parents[1]
    if not (folder / "recipes").is_dir():
        raise ConfigError(
            "figures are remade by recipes, benchmarks and tests, which are not installed with the "
            "package; run this in a checkout of the repository."
        )
    return folder


def _command(figure: Figure, config: ReproduceConfig, folder: Path) -> str:
    """The figure's command with its folders.

    Raises:
        ConfigError: it needs videos, and there are none.
    """
    if "{videos}" in figure.command and (not config.videos or not Path(config.videos).is_dir()):
        problem = f"{config.videos} is not a folder" if config.videos else "--videos is missing"
        raise ConfigError(f"{problem}: {figure.name} needs {figure.needs}.")
    return figure.command.format(
        output=shlex.quote(str(folder / figure.name / "output")),
        videos=shlex.quote(str(Path(config.videos or "").absolute())),
    )


def _run_one(figure: Figure, command: str, folder: Path, repository: Path) -> dict[str, Any]:
    print(f"== {figure.name}: {command}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    text, code = _output(command, folder / "log.txt", repository)
    values: list[dict[str, Any]] = []
    for value in figure.values:
        found = value.find(text)
        holds = code == 0 and value.holds(found)
        row = {"what": value.what, "rule": value.rule, "expected": value.value}
        values.append({**row, "found": found, "holds": holds})
        shown = "nothing" if found is None else f"{found:g}"
        verdict = "holds" if holds else "DOES NOT HOLD"
        print(f"{verdict}: {value.what}: {shown} ({value.rule})", flush=True)
    if code:
        print(f"DOES NOT HOLD: the command ended with {code}", flush=True)
    result = {
        "name": figure.name,
        "document": figure.document,
        "command": command,
        "seed": figure.seed,
        "exit_code": code,
        "values": values,
        "holds": code == 0 and all(row["holds"] for row in values),
        "seconds": round(time.monotonic() - started, 1),
        "environment": environment(),
    }
    files.write_json(folder / "result.json", result)
    return result


def _output(command: str, log: Path, repository: Path) -> tuple[str, int]:
    """What a command printed, shown while it runs and kept in a log, and its exit code."""
    own = {
        "OMP_NUM_THREADS": "1",
        "PATH": _before(str(Path(sys.executable).parent), "PATH"),
        "PYTHONPATH": _before(str(repository), "PYTHONPATH"),
    }
    lines = []
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=repository,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            file.write(line)
            file.flush()
            lines.append(line)
    return "".join(lines), process.returncode


def _before(path: str, variable: str) -> str:
    """The variable's list of paths with one more in front."""
    return os.pathsep.join(filter(None, [path, os.environ.get(variable)]))
