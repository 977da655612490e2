"""Installing into an NVIDIA image: what belongs to its GPU stack stays as it is.

The images are empty packages of their names and versions; all else that pip may choose has the
versions and bounds of this environment's, and newer ones of the image's packages tempt it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR
from helpers.stub_packages import (
    copy_tree,
    make_environment,
    without_pip_settings,
    write_stub,
    write_stubs_of,
)

PROJECT = tomllib.loads((REPOSITORY_DIR / "pyproject.toml").read_text())["project"]
IMAGE = ("torch", "numpy", "megatron-core", "transformer-engine", "apex")
# Newest first in each; megatron-core asks for what it really asks for.
MEGATRON = ("torch>=2.6.0", "numpy", "packaging>=24.2")
OLD_MEGATRON = ("torch>=2.6.0", "numpy<2.0.0", "packaging>=24.2")


def stubs_of_image(folder: Path, versions: tuple[str, ...]) -> list[Path]:
    """Wheels of an image's packages; an empty version leaves one out."""
    folder.mkdir()
    found = dict(zip(IMAGE, versions, strict=True))
    asked = OLD_MEGATRON if found["megatron-core"].startswith("0.15") else MEGATRON
    requires = {"megatron-core": asked, "transformer-engine": ("torch", "packaging")}
    return [
        write_stub(folder, name, version, requires.get(name, ()))
        for name, version in found.items()
        if version
    ]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: all dependencies, and newer ones of what an image has."""
    folder = tmp_path_factory.mktemp("index")
    write_stubs_of(folder, PROJECT["dependencies"], set(IMAGE) - {"numpy"})
    write_stub(folder, "torch", "2.99.0")
    write_stub(folder, "numpy", "2.6.5")
    write_stub(folder, "megatron-core", "0.16.1", MEGATRON)
    write_stub(folder, "megatron-core", "0.99.0", ("torch>=2.99", "numpy>=2.6"))
    write_stub(folder, "transformer-engine", "9.9.0")
    write_stub(folder, "apex", "9.9")
    # On Python 3.12 the newest of these ask for numpy 2.
    write_stub(folder, "scipy", "1.18.1", ("numpy>=2.0",))
    write_stub(folder, "contourpy", "1.4.0", ("numpy>=2.0",))
    write_stub(folder, "tifffile", "2026.11.8", ("numpy>=2.1",))
    # What fits an older numpy: pins and newest do not.
    write_stub(folder, "scipy", "1.11.4", ("numpy<1.28,>=1.21",))
    write_stub(folder, "contourpy", "1.2.0", ("numpy>=1.20",))
    requires = ("cosmos_posttrain", PROJECT["version"], PROJECT["dependencies"])
    write_stub(folder, *requires)
    return folder


def run(python: Path, index: Path, *words: str | Path) -> str:
    finished = subprocess.run(
        [python, "-m", "pip", *words],
        env=without_pip_settings(index),
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def frozen(python: Path, index: Path) -> list[str]:
    """``pip freeze``'s lines."""
    return run(python, index, "freeze").splitlines()


def of_image(versions: tuple[str, ...]) -> set[str]:
    """Those of the image's packages."""
    found = zip(IMAGE, versions, strict=True)
    return {f"{name}=={version}" for name, version in found if version}


@pytest.mark.parametrize(
    "versions",
    [
        ("2.11.0a0+eb65b36914.nv26.2", "1.26.4", "0.17.0rc3", "2.12.0+b91bcc6", "0.1"),
        *(
            pytest.param(versions, marks=pytest.mark.slow)
            for versions in [
                ("2.7.0a0+79aa17489c.nv25.4", "1.26.4", "0.15.3", "2.2.0+c55e425", "0.1"),
                ("2.10.0a0+b558c986e8.nv25.11", "1.26.4", "0.15.0rc7", "2.9.0", "0.1"),
                ("2.12.0a0+0291f960b6.nv26.6", "2.1.0", "0.18.0+5fa4a5b", "2.14.0", "0.1"),
                ("2.12.0a0+0291f960b6.nv26.6", "2.4.1", "0.20.0rc0", "2.14.0", ""),
            ]
        ),
    ],
    ids=lambda versions: versions[2],
)
def test_pip_install_changes_nothing_of_the_image(tmp_path, index, versions):
    image = stubs_of_image(tmp_path / "image", versions)
    python = make_environment(tmp_path / "venv", image)
    run(python, index, "install", "cosmos_posttrain")
    after = frozen(python, index)
    assert of_image(versions) == {line for line in after if line.split("==")[0] in IMAGE}
    assert f"cosmos_posttrain=={PROJECT['version']}" in after


def install(python: Path, index: Path, tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", tree / "scripts" / "install.sh"],
        env={**without_pip_settings(index), "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


def plan(*words: str, path: str = "") -> str:
    """What scripts/install_plan.py says, with these folders before all others."""
    finished = subprocess.run(
        [sys.executable, REPOSITORY_DIR / "scripts/install_plan.py", *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return finished.stdout


def unpacked(folder: Path, name: str, version: str) -> str:
    with zipfile.ZipFile(write_stub(folder.parent, name, version)) as wheel:
        wheel.extractall(folder)
    return str(folder)


def test_of_two_versions_the_first_counts(tmp_path):
    """As for Python's import, and pip: an image may have a second one further back."""
    folders = [unpacked(tmp_path / v, "apex", v) for v in ("0.1", "0.2")]
    assert "apex==0.1" in plan("protected", path=os.pathsep.join(folders)).splitlines()


def test_what_is_newer_than_the_bounds_stays(tmp_path):
    lines = plan("requirements", path=unpacked(tmp_path / "site", "scipy", "1.18.1")).splitlines()
    assert not [line for line in lines if line.startswith("scipy")]
    assert "scikit-image" in lines


def write_torchcodec(site: Path, codec: str) -> None:
    """A torchcodec that is imported like a good one, a 0.10, or one without content."""
    package, metadata = site / "torchcodec", site / "torchcodec-0.10.0.dist-info"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if codec == "empty":
        return
    (package / "__init__.py").write_text("__version__, ffmpeg_major_version = '0.13.0', 5\n")
    field = "fps" if codec == "old" else "rotation"
    (package / "decoders.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass VideoStreamMetadata:\n"
        f"    {field}: float\n"
    )
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: torchcodec\nVersion: 0.10.0\n")


def failing_python(folder: Path, packages: str, said: str) -> Path:
    """An interpreter whose pip fails with ``said``, where the named packages are installed.

    What it imports is real, with ``site`` beside the real packages.
    """
    path = folder / "python"
    path.write_text(
        f"""#!/bin/bash
case "$*" in
    *"has torch") exit 0 ;;
    *"plan.py has "*) [[ " {packages} " == *" ${{@: -1}} "* ]]; exit ;;
    *install_plan.py*) echo a==1 ;;
    *"cosmos_posttrain"*)
        PYTHONPATH="$PYTHONPATH:{folder}/site" exec {sys.executable} "$@" ;;
    *"pip install"*) echo "$*" >> {folder}/calls; [[ "$*" != *{said.split(":")[0]}* ]] && exit 0
        echo "{said.split(":")[1]}" >&2; exit 3 ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def run_script_with(python: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", REPOSITORY_DIR / "scripts/install.sh"],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("packages", "said", "code", "words", "is_tried_again"),
    [
        ("", "requirements.txt: No space left on device", 3, "No space left", False),
        ("", "requirements.txt: ResolutionImpossible", 3, "once more without", True),
        ("", "no-deps: No space left on device", 1, "No space left", False),
        ("megatron-core", "no-deps: old", 1, "take a newer image", False),
    ],
    ids=["disk", "pins", "megatron", "old megatron"],
)
def test_what_pip_says_decides(tmp_path, packages, said, code, words, is_tried_again):
    finished = run_script_with(failing_python(tmp_path, packages, said))
    assert finished.returncode == code, finished.stderr
    assert words in finished.stderr.splitlines()[-1] or code in (0, 3)
    assert words in finished.stderr
    assert ("once more" in finished.stderr) == is_tried_again
    assert ("newer image" in finished.stderr) == ("newer image" in words)


@pytest.mark.parametrize(
    ("codec", "code", "words"),
    [
        ("empty", 1, "torchcodec is installed but cannot be loaded"),
        ("old", 1, "torchcodec 0.10.0 is too old to read video with"),
        ("good", 0, "torchcodec 0.13.0 (FFmpeg 5), which is here, reads videos"),
    ],
)
def test_without_pyav_torchcodec_must_be_one_that_reads(tmp_path, codec, code, words):
    write_torchcodec(tmp_path / "site", codec)
    python = failing_python(tmp_path, "torchcodec", "only-binary: No matching distribution")
    finished = run_script_with(python)
    assert finished.returncode == code, finished.stdout + finished.stderr
    assert words in (finished.stderr if code else finished.stdout)
    if code:
        assert finished.stderr.splitlines()[-1].startswith("install: PyAV could not be installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "versions",
    [
        # megatron-core asks for torch>=2.6.0, which a pre-release of it is not; and an older numpy
        # than the pinned scipy takes.
        ("2.6.0a0+ecf3bae40a.nv25.1", "1.26.0", "", "1.14.0", "0.1"),
        ("2.12.0a0+0291f960b6.nv26.6", "2.4.1", "0.19.0rc1", "2.14.0", "0.1"),
    ],
    ids=["without megatron-core", "with megatron-core"],
)
def test_the_script_changes_nothing_of_the_image(tmp_path, index, versions):
    image = stubs_of_image(tmp_path / "image", versions)
    python = make_environment(tmp_path / "venv", image)
    finished = install(python, index, copy_tree(REPOSITORY_DIR, tmp_path / "tree"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    after = frozen(python, index)
    added = set() if versions[2] else {"megatron-core==0.16.1"}  # the pin
    assert {line for line in after if line.split("==")[0] in IMAGE} == of_image(versions) | added
    assert ("once more without them" in finished.stderr) == (versions[1] == "1.26.0")
    assert any(line.startswith("av==") for line in after)


@pytest.mark.slow
def test_where_pip_finds_no_pyav_nothing_reads_videos(tmp_path, index):
    versions = ("2.12.0a0+0291f960b6.nv26.6", "2.4.1", "0.19.2", "", "")
    image = stubs_of_image(tmp_path / "image", versions)
    without = tmp_path / "index"
    without.mkdir()
    for wheel in index.glob("*.whl"):
        if not wheel.name.startswith("av-"):
            (without / wheel.name).symlink_to(wheel)
    python = make_environment(tmp_path / "venv", image)
    tree = copy_tree(REPOSITORY_DIR, tmp_path / "tree")
    finished = install(python, without, tree)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("install: PyAV could not be installed, so")


@pytest.mark.slow
def test_a_megatron_core_that_is_too_old_stays_and_is_refused(tmp_path, index):
    versions = ("2.6.0", "1.26.4", "0.13.1", "", "")
    python = make_environment(tmp_path / "venv", stubs_of_image(tmp_path / "image", versions))
    finished = install(python, index, copy_tree(REPOSITORY_DIR, tmp_path / "tree"))
    assert finished.returncode == 1
    assert "what is here stays: take a newer image" in finished.stderr.splitlines()[-1]
    assert "megatron-core==0.13.1" in frozen(python, index)
