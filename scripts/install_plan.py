"""What ``scripts/install.sh`` installs: lists made from pyproject.toml and from what is there.

Flows in: pyproject.toml, constraints.txt, the packages of this interpreter. Flows out, on stdout:

    protected              ``name==version`` of each installed package of the GPU stack
    constraints            the pins of constraints.txt for packages that are not installed yet, and
                           the installed versions of the protected ones
    requirements           the dependencies (and those of EXTRAS, with the extras that these name)
                           but torch, megatron-core and PyAV
    requirements NAME ...  the dependencies with these names alone
    has NAME               exit code 0 if that package is installed
    check-python           exit code 2, with a sentence, if this Python is too old
    check-nemo ENVIRONMENT  exit code 2, with a sentence, if NeMo fits neither the environment in
                           that folder nor, where there is none, this Python

Standard library only: it runs before anything else is there.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Built against each other, or tried together, in NVIDIA's images. numpy is here because torch and
# apex are compiled against the image's one.
PROTECTED = re.compile(
    r"(torch|torchvision|torchaudio|torchao|torchcodec|torch-tensorrt|pytorch-triton|triton"
    r"|transformer-engine.*|apex|flash-attn.*|numpy|nvidia-.*|cuda-.*|cudnn.*"
    r"|megatron-.*|nemo-.*)"
)
# Their bounds in pyproject.toml keep numpy 1.26 with pip alone; here numpy is constrained, so what
# is there of these stays, however new.
BOUNDED_FOR_NUMPY = ("contourpy", "scipy", "tifffile")
INSTALLED_ALONE = ("torch", "megatron-core", "av")
# constraints-nemo.txt has numpy 1.26, which has no files for newer ones.
NEMO_PYTHONS = ((3, 11), (3, 12))


def canonical(name: str) -> str:
    """``Transformer_Engine`` -> ``transformer-engine``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    """The package's name in ``name[extra]>=1; marker``."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    assert match, requirement
    return canonical(match.group())


def installed() -> dict[str, str]:
    """Versions of the packages that this interpreter finds, by canonical name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(canonical(name), distribution.version)  # the first one is imported
    return found


def protected() -> list[str]:
    """``name==version`` of each installed package that must stay as it is."""
    return sorted(
        f"{name}=={version}" for name, version in installed().items() if PROTECTED.fullmatch(name)
    )


def constraints() -> list[str]:
    """Pins for what is missing, and the installed versions of what must not change."""
    present = installed()
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    missing = [
        pin for pin in pins if pin and not pin.startswith("#") and name_of(pin) not in present
    ]
    return missing + protected()


def split_names(text: str) -> list[str]:
    """``serve, wandb`` -> two names."""
    return [name for name in re.split(r"[,\s]+", text) if name]


def requirements(names: list[str]) -> list[str]:
    """Dependencies of the package and of EXTRAS: called ``names``, or all that go together."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines: list[str] = list(project["dependencies"])
    waiting, done = split_names(os.environ.get("EXTRAS", "")), set()
    while waiting:
        extra = waiting.pop(0)
        if extra in done:
            continue
        done.add(extra)
        if extra not in project["optional-dependencies"]:
            sys.exit(
                f"install: no extra {extra!r} in pyproject.toml; EXTRAS may name "
                f"{', '.join(sorted(project['optional-dependencies']))}."
            )
        for line in project["optional-dependencies"][extra]:
            if name_of(line) == canonical(project["name"]):  # no index may be asked for us
                waiting += split_names(line.partition("[")[2].partition("]")[0])
            else:
                lines.append(line)
    if names:
        return [line for line in lines if name_of(line) in names]
    left_out = {*INSTALLED_ALONE, *(name for name in BOUNDED_FOR_NUMPY if name in installed())}
    return [line for line in lines if name_of(line) not in left_out]


def check_python() -> int:
    """Exit code 2, with a sentence, if this Python is too old for the package."""
    if sys.version_info >= (3, 11):  # noqa: UP036 (older ones run this file too)
        return 0
    print(
        f"error: {sys.executable} is Python {sys.version_info[0]}.{sys.version_info[1]}, but "
        "cosmos_posttrain needs 3.11 or newer; set PYTHON to a newer interpreter, such as "
        "PYTHON=python3.11.",
        file=sys.stderr,
    )
    return 2


def check_nemo(environment: Path, this_python: tuple[int, ...] = sys.version_info[:2]) -> int:
    """Exit code 2, with a sentence, if NeMo cannot go into the environment of that folder."""
    fitting = " or ".join(f"{major}.{minor}" for major, minor in NEMO_PYTHONS)
    settings = environment / "pyvenv.cfg"
    text = settings.read_text() if settings.is_file() else ""
    found = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", text, re.M)
    version = (int(found[1]), int(found[2])) if found else this_python
    if version in NEMO_PYTHONS:
        return 0
    name = environment if found else sys.executable
    fix = f"remove it (rm -r '{environment}') and " if found else ""
    print(
        f"error: {name} is Python {version[0]}.{version[1]}, but NeMo's packages need {fitting}; "
        f"{fix}set PYTHON to such an interpreter: make nemo-env PYTHON=python3.11.",
        file=sys.stderr,
    )
    return 2


def main(arguments: list[str]) -> int:
    """Runs one of the commands in the module's docstring."""
    command, names = arguments[0], arguments[1:]
    if command == "check-python":
        return check_python()
    if command == "check-nemo":
        return check_nemo(Path(names[0]))
    if command == "has":
        return 0 if all(canonical(name) in installed() for name in names) else 1
    lists = {
        "protected": protected,
        "constraints": constraints,
        "requirements": lambda: requirements(names),
    }
    print("\n".join(lists[command]()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
