"""Packages without content for tests of installation: pip sees names, versions and dependencies."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def write_stub(folder: Path, name: str, version: str, requires: Iterable[str] = ()) -> Path:
    """A wheel of any version that installs nothing but its metadata."""
    stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {"METADATA": "\n".join(lines) + "\n", "WHEEL": tag}
    # Without a record, pip could not replace it.
    files["RECORD"] = "".join(f"{stem}.dist-info/{name},,\n" for name in (*files, "RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(f"{stem}.dist-info/{name}", content)
    return path


def write_stubs_of(folder: Path, requirements: Iterable[str], leave_out: set[str]) -> None:
    """Stubs of what this environment has for the requirements, with all that these ask for.

    Versions and dependencies are the real ones, so pip has the real bounds to meet.
    """
    waiting, done = list(requirements), set(leave_out)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name in done or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        done.add(name)
        asked = [
            line
            for line in importlib.metadata.requires(name) or []
            if "extra ==" not in line  # nobody asks for an extra here
        ]
        write_stub(folder, name, importlib.metadata.version(name), asked)
        waiting += asked


def make_environment(folder: Path, installed: Iterable[Path]) -> Path:
    """An empty environment with this one's pip and setuptools and the given wheels.

    Returns:
        Its interpreter.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = folder / "lib" / version / "site-packages"
    source = next(Path(path) for path in site.getsitepackages() if (Path(path) / "pip").is_dir())
    for pattern in ("pip", "pip-*", "setuptools", "setuptools-*", "_distutils_hack"):
        for path in source.glob(pattern):
            (packages / path.name).symlink_to(path)
    for wheel in installed:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(packages)
    return folder / "bin" / "python"


def without_pip_settings(index: Path) -> dict[str, str]:
    """The environment's variables for a pip that knows one folder of wheels and no index."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return {
        **kept,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way of saying yes
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def copy_tree(root: Path, target: Path) -> Path:
    """What scripts/install.sh needs of a checkout."""
    shutil.copytree(root / "scripts", target / "scripts")
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(root / name, target / name)
    (target / "cosmos_posttrain").mkdir()
    (target / "cosmos_posttrain/__init__.py").touch()
    return target
