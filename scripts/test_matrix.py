"""Tries the package under several versions of Python, of Megatron-Core and of torch.

Flows in: pairs such as 3.11/0.19.2, or 3.11/0.16.1/2.6.0 for another torch than constraints.txt's.
Flows out: environments in ``.matrix`` (kept, and made again when the constraints change), the
results of the tests marked ``compat`` in each, and of ``tests/compat``: in each version a run,
whose curve is held against the others', and which goes on from a checkpoint of every other. The
last lines are a table in markdown.

    python scripts/test_matrix.py                       # every pair whose Python is on this machine
    python scripts/test_matrix.py 3.11/0.15.3 3.12/0.19.2

A pair's environment holds its megatron-core and takes all else from a base: for the Python that
runs this file the environment that it runs in (make setup's), for each other Python or torch one
that is made here, with torch from TORCH_INDEX_URL where that is set (pip's own index has torch with
CUDA, several GB). megatron-core from 0.17 on asks for Python 3.12, but has files for 3.11: there
that rule is set aside. Exit code 1 where a test fails.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAIRS = (
    "3.11/0.15.3",
    "3.11/0.16.1",
    "3.11/0.17.1",
    "3.11/0.18.2",
    "3.11/0.19.2",
    "3.11/0.16.1/2.6.0",
    "3.12/0.16.1",
    "3.12/0.19.2",
    "3.13/0.19.2",
)
SELECTED = "compat and not slow and not gpu"
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
THIS_LIBRARY = sysconfig.get_path("purelib")


@dataclass(frozen=True)
class Pair:
    """A version of Python (3.11) and one of Megatron-Core (0.16.1).

    Attributes:
        python: its first two numbers.
        core: as on the package index.
        torch: likewise; empty means that of constraints.txt.
    """

    python: str
    core: str
    torch: str = ""

    @property
    def base(self) -> Path | None:
        """The environment with all but Megatron-Core; None is the one that this file runs in."""
        if (self.python, self.torch) == (THIS_PYTHON, ""):
            return None
        return ROOT / ".matrix" / f"python{self.python}{self.torch and f'-torch{self.torch}'}"

    @property
    def folder(self) -> Path:
        """Of its environment."""
        base = f"python{self.python}{self.torch and f'-torch{self.torch}'}"
        return ROOT / ".matrix" / f"{base}-core{self.core}"

    @property
    def interpreter(self) -> Path:
        """In its environment."""
        return interpreter_of(self.folder)


def interpreter_of(environment: Path) -> Path:
    """The Python of an environment."""
    return environment / "bin" / "python"


def read_pair(text: str) -> Pair:
    """``3.11/0.16.1`` or ``3.11/0.16.1/2.6.0``."""
    match = re.fullmatch(r"(\d+\.\d+)/(\d+(?:\.\d+)+)(?:/(\d+(?:\.\d+)+))?", text)
    if match is None:
        sys.exit(f"error: {text!r} is no PYTHON/MEGATRON_CORE[/TORCH], such as 3.11/0.16.1.")
    return Pair(*match.groups(default=""))


def find_python(version: str) -> str | None:
    """An interpreter of that version."""
    if version == THIS_PYTHON:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None:
        return None
    # A version manager leaves names behind for versions that it does not switch on.
    works = subprocess.run([found, "-c", ""], capture_output=True).returncode == 0
    return found if works else None


def pins(torch: str) -> list[str]:
    """constraints.txt without Megatron-Core, and with this torch where one is named."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    chosen = ("#", "megatron-core==", *(("torch==", "sympy==") if torch else ()))
    kept = [line for line in lines if line and not line.startswith(chosen)]
    return [*kept, f"torch=={torch}"] if torch else kept


def make_environment(pair: Pair, python: str) -> None:
    """Makes what a pair runs in, and its base, unless they are there as they would be made."""
    parts = [pair.python, pair.torch, THIS_PYTHON, THIS_LIBRARY, *pins(pair.torch)]
    wanted = "\n".join([*parts, (ROOT / "pyproject.toml").read_text()])
    libraries = [THIS_LIBRARY] if pair.python == THIS_PYTHON else []
    if pair.base is not None:
        if not _is_made(pair.base, wanted):
            _begin(pair.base, python, libraries)
            _install_base(pair, pair.base)
            _finish(pair.base, wanted)
        libraries = [library_of(pair.base), *libraries]
    if not _is_made(pair.folder, wanted + pair.core):
        _begin(pair.folder, python, libraries)
        _install_core(pair)
        _finish(pair.folder, wanted + pair.core)


def library_of(environment: Path) -> str:
    """The folder of its packages."""
    return _output(environment, "import sysconfig; print(sysconfig.get_path('purelib'))")


def _digest(wanted: str) -> str:
    return hashlib.sha256(wanted.encode()).hexdigest()


def _is_made(environment: Path, wanted: str) -> bool:
    stamp = environment / "stamp"
    return stamp.is_file() and stamp.read_text() == _digest(wanted)


def _begin(environment: Path, python: str, libraries: list[str]) -> None:
    """An environment that finds, after its own packages, those of other ones."""
    shutil.rmtree(environment, ignore_errors=True)
    subprocess.run([python, "-m", "venv", environment], check=True)
    (Path(library_of(environment)) / "shared.pth").write_text("\n".join(libraries) + "\n")


def _finish(environment: Path, wanted: str) -> None:
    (environment / "stamp").write_text(_digest(wanted))


def _pip(environment: Path) -> list[str]:
    return [str(interpreter_of(environment)), "-m", "pip", "install", "--quiet"]


def _install_base(pair: Pair, base: Path) -> None:
    """All packages, or where others are found torch alone."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins(pair.torch)) + "\n")
        pip = [*_pip(base), "--constraint", str(constraints)]
        index = os.environ.get("TORCH_INDEX_URL")
        if index or pair.torch:
            source = ["--index-url", index] if index else []
            subprocess.run([*pip, *source, "torch"], check=True)
        if pair.python != THIS_PYTHON:
            subprocess.run([*pip, "--editable", f"{ROOT}[dev,samples]"], check=True)


def _install_core(pair: Pair) -> None:
    pip = [*_pip(pair.folder), "--no-deps"]
    core = ["--ignore-requires-python", f"megatron-core=={pair.core}"]
    subprocess.run([*pip, *core], check=True)
    if "No module named 'triton'" in _output(pair.folder, "import megatron.core"):
        # From 0.19 on it is imported, and comes with torch for CUDA alone.
        subprocess.run([*pip, "triton"], check=True)


def _output(environment: Path, code: str) -> str:
    """What a line of Python prints there, errors included."""
    finished = subprocess.run(
        [interpreter_of(environment), "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return finished.stdout.strip()


@dataclass
class Counts:
    """Tests of one environment."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def add(self, report: Path, seconds: float) -> None:
        """Counts what pytest's JUnit file says; a missing one, or one of no test, is a failure."""
        self.seconds += seconds
        before = self.passed + self.failed
        if report.is_file():
            self._add_suites(report)
        if self.passed + self.failed == before:
            print("error: not one of these tests ran; see above.", flush=True)
            self.failed += 1

    def _add_suites(self, report: Path) -> None:
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            found = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors")}
            skipped, failed = int(suite.get("skipped", 0)), found["failures"] + found["errors"]
            self.skipped += skipped
            self.failed += failed
            self.passed += found["tests"] - failed - skipped


def run_tests(pair: Pair, runs: Path, arguments: list[str], counts: Counts) -> None:
    """Runs pytest there, on this checkout."""
    report = runs / "report.xml"
    report.unlink(missing_ok=True)
    search = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)
    environment = {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "COSMOS_MATRIX_DIR": str(runs)}
    path = f"{pair.interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    started = time.monotonic()
    subprocess.run(
        [pair.interpreter, "-m", "pytest", "-q", f"--junitxml={report}", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment, "PATH": path},
    )
    counts.add(report, time.monotonic() - started)


def show(results: dict[Pair, Counts], versions: dict[Pair, str]) -> None:
    """Prints the table."""
    print("\n| Python | megatron-core | torch | passed | failed | skipped | seconds |")
    print("|---|---|---|---|---|---|---|")
    for pair, found in results.items():
        print(
            f"| {pair.python} | {pair.core} | {versions[pair]} | {found.passed} | {found.failed} "
            f"| {found.skipped} | {found.seconds:.0f} |"
        )


def main() -> int:
    """Makes the environments, runs the tests, prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", metavar="PYTHON/MEGATRON_CORE[/TORCH]")
    arguments = parser.parse_args()
    results: dict[Pair, Counts] = {}
    for pair in map(read_pair, arguments.pairs or PAIRS):
        python = find_python(pair.python)
        if python is None and arguments.pairs:
            sys.exit(f"error: there is no python{pair.python} on this machine.")
        if python is None:
            print(f"== Python {pair.python} is not on this machine: {pair.core} is left out")
            continue
        named = f", torch {pair.torch}" if pair.torch else ""
        print(f"== Python {pair.python}, megatron-core {pair.core}{named}", flush=True)
        make_environment(pair, python)
        results[pair] = Counts()
    print_torch = "import torch; print(torch.__version__)"
    versions = {pair: _output(pair.folder, print_torch) for pair in results}
    with tempfile.TemporaryDirectory() as folder:
        for pair, counts in results.items():
            run_tests(pair, Path(folder), ["-m", SELECTED], counts)
            run_tests(pair, Path(folder), ["tests/compat", "-k", "writes"], counts)
        for pair, counts in results.items() if len(results) > 1 else ():
            run_tests(pair, Path(folder), ["tests/compat", "-k", "others"], counts)
    show(results, versions)
    return 1 if any(counts.failed for counts in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
