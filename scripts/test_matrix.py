"""Tries the package under several versions of Python and of Megatron-Core.

Flows in: pairs such as 3.11/0.19.2, and constraints.txt. Flows out: an environment for each in
``.matrix`` (kept, and made again when the constraints change), the results of the tests marked
``compat`` in each, and of ``tests/compat``: in each version a run, whose curve is held against the
others', and which goes on from a checkpoint of every other. The last lines are a table in markdown.

    python scripts/test_matrix.py                       # every pair whose Python is on this machine
    python scripts/test_matrix.py 3.11/0.15.3 3.12/0.19.2

An environment for the Python that runs this file takes everything but megatron-core from the one
that it runs in (make setup's); other ones get everything of their own, with torch from
TORCH_INDEX_URL where that is set (pip's own index has torch with CUDA, several GB). megatron-core
from 0.17 on asks for Python 3.12, but has files for 3.11: there that rule is set aside. Exit code 1
where a test fails.
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
    "3.12/0.16.1",
    "3.12/0.19.2",
    "3.13/0.19.2",
)
SELECTED = "compat and not slow and not gpu"
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Pair:
    """A version of Python (3.11) and one of Megatron-Core (0.16.1)."""

    python: str
    core: str

    @property
    def folder(self) -> Path:
        """Of its environment."""
        return ROOT / ".matrix" / f"python{self.python}-core{self.core}"

    @property
    def interpreter(self) -> Path:
        """In its environment."""
        return self.folder / "bin" / "python"


def read_pair(text: str) -> Pair:
    """``3.11/0.16.1``."""
    match = re.fullmatch(r"(\d+\.\d+)/(\d+(?:\.\d+)+)", text)
    if match is None:
        sys.exit(f"error: {text!r} is no PYTHON/MEGATRON_CORE, such as 3.11/0.16.1.")
    return Pair(*match.groups())


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


def pins() -> list[str]:
    """constraints.txt without what a pair chooses."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "megatron-core=="))]


def make_environment(pair: Pair, base: str) -> None:
    """Makes it, unless it is there as it would be made."""
    wanted = "\n".join([str(pair), THIS_PYTHON, sysconfig.get_path("purelib"), *pins()])
    wanted += (ROOT / "pyproject.toml").read_text()
    stamp, digest = pair.folder / "stamp", hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return
    shutil.rmtree(pair.folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", pair.folder], check=True)
    pip = [str(pair.interpreter), "-m", "pip", "install", "--quiet"]
    if pair.python == THIS_PYTHON:
        library = Path(_output(pair, "import sysconfig; print(sysconfig.get_path('purelib'))"))
        (library / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    else:
        _install_all(pip)
    core = ["--no-deps", "--ignore-requires-python", f"megatron-core=={pair.core}"]
    subprocess.run([*pip, *core], check=True)
    if "No module named 'triton'" in _output(pair, "import megatron.core"):
        # From 0.19 on it is imported, and comes with torch for CUDA alone.
        subprocess.run([*pip, "--no-deps", "triton"], check=True)
    stamp.write_text(digest)


def _install_all(pip: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins()) + "\n")
        if index := os.environ.get("TORCH_INDEX_URL"):
            torch = ["--index-url", index, "--constraint", str(constraints), "torch"]
            subprocess.run([*pip, *torch], check=True)
        package = ["--constraint", str(constraints), "--editable", f"{ROOT}[dev,samples]"]
        subprocess.run([*pip, *package], check=True)


def _output(pair: Pair, code: str) -> str:
    """What a line of Python prints there, errors included."""
    finished = subprocess.run(
        [pair.interpreter, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
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
        """Counts what pytest's JUnit file says; a missing one is a failure."""
        self.seconds += seconds
        if not report.is_file():
            self.failed += 1
            return
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
    parser.add_argument("pairs", nargs="*", metavar="PYTHON/MEGATRON_CORE")
    arguments = parser.parse_args()
    results: dict[Pair, Counts] = {}
    for pair in map(read_pair, arguments.pairs or PAIRS):
        base = find_python(pair.python)
        if base is None and arguments.pairs:
            sys.exit(f"error: there is no python{pair.python} on this machine.")
        if base is None:
            print(f"== Python {pair.python} is not on this machine: {pair.core} is left out")
            continue
        print(f"== Python {pair.python}, megatron-core {pair.core}", flush=True)
        make_environment(pair, base)
        results[pair] = Counts()
    versions = {pair: _output(pair, "import torch; print(torch.__version__)") for pair in results}
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
