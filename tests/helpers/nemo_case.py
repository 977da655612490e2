"""Runs of both engines on small data, for the tests of ``--engine nemo``.

Flows in: what a run is to be. Flows out: command lines, and finished runs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cosmos_posttrain.checkpoint.context import list_checkpoints
from cosmos_posttrain.nemo.extra import is_installed
from helpers.distributed_run import REPOSITORY_DIR, run_script

MAX_STEPS = 20
# The gradient is divided by the number of tokens before its sum there, and after it here.
CLOSE = 1e-4
SCRIPTS = {"base": "train_general.py", "text": "train_video2world.py"}
MODELS = {"base": "random:tiny", "text": "random:tiny-video2world"}
# NeMo's import takes half a minute, and warns in many places: processes of their own.
NEEDS_NEMO = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="NeMo is missing; see make nemo-env"),
]

Train = Callable[..., Path]

# A training script with further code before it, which may look at what the run does.
WATCHED = """
import os, runpy, sys

{before}
if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def words_of(data: dict[str, Path], kind: str, log_dir: Path, engine: str, size: int) -> list[Any]:
    """A run's command line."""
    words: list[Any] = [SCRIPTS[kind], "--data_path", data[kind], "--model_path", MODELS[kind]]
    words += ["--split_string", "3,1,1", "--global_batch_size", 4, "--lr", 1e-3, "--num_threads", 1]
    words += ["--max_steps", MAX_STEPS, "--save_every_n_steps", 10, "--log_dir", log_dir]
    return [*words, "--tensor_model_parallel_size", size, "--engine", engine]


def watched(folder: Path, before: str, words: list[Any]) -> list[Any]:
    """The same command line, with code of the test's own before the script.

    Args:
        folder: for the program.
        before: the code.
        words: begins with the script.
    """
    folder.mkdir(exist_ok=True)
    program = folder / "watched.py"
    program.write_text(WATCHED.replace("{before}", before))
    return [program, REPOSITORY_DIR / words[0], *words[1:]]


def finish(
    words: list[Any], size: int = 1, code: int = 0, env: Mapping[str, str] | None = None
) -> str:
    """Runs it; returns what it said.

    Args:
        words: the script and its flags.
        size: number of processes.
        code: that it must end with.
        env: further variables.
    """
    variables = {"WANDB_MODE": "offline", "PYTHONPATH": str(REPOSITORY_DIR), **(env or {})}
    done = run_script(words, size, env=variables, timeout_seconds=900)
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def crashed(run: Path, log_dir: Path) -> Path:
    """A copy of a run that was killed after its first checkpoint."""
    shutil.copytree(run, log_dir)
    shutil.rmtree(list_checkpoints(log_dir)[-1])
    return log_dir
