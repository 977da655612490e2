"""A root script's whole way from its command line to its exit code, in the test's own process."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence

import pytest

from helpers.distributed_run import REPOSITORY_DIR


def run_here(
    script: str,
    arguments: Sequence[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[object, str]:
    """Runs a script as ``python SCRIPT ARGUMENTS`` does; its exit code and its stderr."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(REPOSITORY_DIR / script), run_name="__main__")
    return exit_.value.code, capsys.readouterr().err
