"""Makefile, Docker's list, the extras and the matrix: what makes environments and tries them."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from helpers.distributed_run import REPOSITORY_DIR

PROJECT = tomllib.loads((REPOSITORY_DIR / "pyproject.toml").read_text())["project"]
NAMES = {
    "test": '<testcase classname="a" name="b"/>',
    "skip": '<testcase classname="a" name="b"><skipped message="c"/></testcase>',
}


def script(name: str) -> ModuleType:
    """A file of scripts/ as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY_DIR / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def names_in(file: str) -> set[str]:
    lines = (REPOSITORY_DIR / file).read_text().splitlines()
    names = {line.removeprefix("**/").strip("/") for line in lines if not line.startswith("#")}
    return names - {""}


def test_docker_copies_nothing_that_git_ignores() -> None:
    """An environment of 3 GB among it."""
    assert names_in(".gitignore") <= names_in(".dockerignore")
    assert {".venv", ".venv-nemo", ".matrix", ".git"} <= names_in(".dockerignore")


def test_an_extra_of_extras_is_spelled_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip would look for the package itself on the index."""
    monkeypatch.setenv("EXTRAS", "dev, gpu")
    plan = script("install_plan")
    lines = plan.requirements([])
    assert {"ruff", "fastapi", "wandb", "transformer-engine"} <= set(map(plan.name_of, lines))
    assert not [line for line in lines if plan.name_of(line) == "cosmos-posttrain"]
    monkeypatch.setenv("EXTRAS", "dev,development")
    with pytest.raises(SystemExit, match=r"no extra 'development' in pyproject\.toml"):
        plan.requirements([])


def write_environment(folder: Path, version: str) -> Path:
    """A folder that says that it is one, whose interpreter notes that it was called."""
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {version}\n")
    python = folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\ntouch {folder}/called\nexit 1\n")
    python.chmod(0o755)
    return folder


def test_an_environment_that_nemo_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    folder = write_environment(tmp_path / "nemo", "3.13.0")
    finished = subprocess.run(
        ["make", "nemo-env", f"NEMO_VENV={folder}", f"PYTHON={sys.executable}"],
        cwd=REPOSITORY_DIR,
        env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    error = next(line for line in finished.stderr.splitlines() if line.startswith("error: "))
    assert f"{folder} is Python 3.13, but NeMo's packages need 3.11 or 3.12; remove it" in error
    assert "make nemo-env PYTHON=python3.11" in error
    assert not (folder / "called").exists()


@pytest.mark.parametrize(
    ("existing", "this", "code"),
    [("", (3, 13), 2), ("", (3, 12), 0), ("3.11.7", (3, 13), 0), ("3.10.2", (3, 11), 2)],
)
def test_which_pythons_nemo_fits(
    tmp_path: Path, existing: str, this: tuple[int, int], code: int
) -> None:
    if existing:
        write_environment(tmp_path / "nemo", existing)
    assert script("install_plan").check_nemo(tmp_path / "nemo", this) == code


def test_the_extra_nemo_has_what_its_engine_is_asked_for() -> None:
    """NeMo itself comes without its own dependencies, by make nemo-env."""
    extra = PROJECT["optional-dependencies"]["nemo"]
    plan = script("install_plan")
    names = {plan.name_of(line) for line in extra}
    assert {"lightning", "fiddle", "nemo-run"} <= names and "nemo-toolkit" not in names
    assert "megatron-core==0.15.3" in extra
    assert "'.[nemo]'" in (REPOSITORY_DIR / "Makefile").read_text()


@pytest.mark.parametrize(
    ("cases", "passed", "failed"),
    [(("test", "skip"), 1, 0), (("skip", "skip"), 0, 1), ((), 0, 1), (None, 0, 1)],
    ids=["one", "skipped", "none", "no report"],
)
def test_a_pair_of_the_matrix_that_runs_nothing_has_failed(
    tmp_path: Path, cases: tuple[str, ...] | None, passed: int, failed: int
) -> None:
    report = tmp_path / "report.xml"
    if cases is not None:
        counts = f'tests="{len(cases)}" failures="0" errors="0" skipped="{cases.count("skip")}"'
        suite = "".join(NAMES[case] for case in cases)
        report.write_text(f"<testsuites><testsuite {counts}>{suite}</testsuite></testsuites>")
    found = script("test_matrix").Counts()
    found.add(report, 1.0)
    assert (found.passed, found.failed) == (passed, failed)
