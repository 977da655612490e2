"""The order of the rooms: imports go one way, megatron stays where it belongs, scripts are thin."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY_DIR = Path(__file__).resolve().parents[1]
PACKAGE = "cosmos_posttrain"
PACKAGE_DIR = REPOSITORY_DIR / PACKAGE

# A room imports itself and the rooms before its group, never one beside it. The first group is a
# chain: each of its files imports only those to its left.
GROUND = (
    *("errors", "warning_filters", "geometry", "config", "cli", "files", "hub", "launch"),
    "environment",
)
ROOMS = (
    *((room,) for room in GROUND),
    ("runlog",),
    ("distributed",),
    ("video",),
    ("tokenizer", "text", "actions"),
    ("data",),
    ("prepare",),
    ("models",),
    ("checkpoint",),
    ("transfer",),
    ("inference",),
    ("training", "tokenizer_training"),
    ("evaluation",),
    ("nemo", "serve"),
    ("installation",),
    ("plan", "doctor", "download", "reproduce", "toy_world"),
    ("submit",),
)
ORDER = {room: position for position, group in enumerate(ROOMS) for room in group}

MEGATRON_ROOMS = {"models", "checkpoint", "distributed", "training", "inference", "nemo"}
MEGATRON_FILES = {"data/indexed.py"}

MAX_SCRIPT_LINES = 80
MAX_MODULE_LINES = 500


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every absolute import, also those inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def room_of(path: Path) -> str:
    """``cosmos_posttrain/data/indexed.py`` -> ``data``; the package's own __init__ -> ``""``."""
    first = path.relative_to(PACKAGE_DIR).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def is_entry_point(file: str) -> bool:
    """``__main__`` files and the package's own ``__init__`` may import any room."""
    return file == "__init__.py" or Path(file).name == "__main__.py"


def imported_files(path: Path) -> set[Path]:
    """The package's files that one of them imports, also inside functions."""
    found = set()
    for _, name in imported_names(path.read_text()):
        parts = name.split(".")
        while parts and parts[0] == PACKAGE:
            target = REPOSITORY_DIR.joinpath(*parts)
            for file in (target.with_suffix(".py"), target / "__init__.py"):
                if file.is_file():
                    found.add(file)
                    parts = []
            parts = parts[:-1]
    return found - {path, PACKAGE_DIR / "__init__.py"}


def circle_in(graph: dict[Path, set[Path]]) -> list[Path]:
    """Files that import one another in a circle; empty where there are none."""
    done: set[Path] = set()

    def visit(path: Path, way: list[Path]) -> list[Path]:
        if path in way:
            return way[way.index(path) :]
        if path in done:
            return []
        for target in sorted(graph.get(path, ())):
            if found := visit(target, [*way, path]):
                return found
        done.add(path)
        return []

    return next((found for path in sorted(graph) if (found := visit(path, []))), [])


def problems_of(source: str, room: str, file: str, scripts: set[str]) -> list[str]:
    """What one module imports against the rules, as ``file:line: sentence``."""
    problems = []
    for line, name in imported_names(source):
        root, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if name.startswith("."):
            problems.append(f"{file}:{line}: relative import {name}")
        elif root in scripts:
            problems.append(f"{file}:{line}: imports the script {root}")
        elif root == "megatron" and room not in MEGATRON_ROOMS and file not in MEGATRON_FILES:
            problems.append(f"{file}:{line}: imports {name} outside the rooms for megatron")
        elif (
            root == PACKAGE
            and not is_entry_point(file)
            and target not in ("", room)
            and ORDER.get(target, -1) >= ORDER[room]
        ):
            problems.append(f"{file}:{line}: {room} imports {target}, not a room before it")
    return sorted(set(problems))


def root_scripts() -> list[Path]:
    return sorted(REPOSITORY_DIR.glob("*.py"))


def modules() -> list[Path]:
    return sorted(PACKAGE_DIR.rglob("*.py"))


def test_every_room_has_a_place() -> None:
    rooms = {room_of(path) for path in modules()} - {""}
    assert rooms - set(ORDER) == set(), "name the new rooms in ROOMS"


def test_imports_go_one_way() -> None:
    scripts = {path.stem for path in root_scripts()}
    problems = [
        problem
        for path in modules()
        for problem in problems_of(
            path.read_text(), room_of(path), path.relative_to(PACKAGE_DIR).as_posix(), scripts
        )
    ]
    assert problems == []


def test_no_two_files_import_each_other() -> None:
    assert circle_in({path: imported_files(path) for path in modules()}) == []


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                file = path.relative_to(PACKAGE_DIR).as_posix()
                places.setdefault(node.name, []).append(file)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_a_circle_is_found() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert circle_in({a: {b}, b: {c}, c: {b}}) == [b, c]
    assert circle_in({a: {b, c}, b: {c}}) == []


@pytest.mark.parametrize(
    ("source", "room", "file"),
    [
        ("from cosmos_posttrain.training import loop", "data", "data/batch.py"),
        ("def f():\n    import cosmos_posttrain.models.rope", "video", "video/decode.py"),
        ("from cosmos_posttrain import inference", "models", "models/builder.py"),
        ("from megatron.core import parallel_state", "data", "data/batch.py"),
        ("import megatron.core", "evaluation", "evaluation/loss.py"),
        ("import infer", "inference", "inference/run.py"),
        ("from cosmos_posttrain import tokenizer_training", "training", "training/step.py"),
        ("from cosmos_posttrain.launch import rank", "hub", "hub.py"),
        ("from .rope import angles", "models", "models/builder.py"),
    ],
)
def test_a_broken_rule_is_found(source: str, room: str, file: str) -> None:
    assert len(problems_of(source, room, file, {"infer"})) >= 1


@pytest.mark.parametrize(
    ("source", "room", "file"),
    [
        ("from cosmos_posttrain.video.decode import read", "data", "data/batch.py"),
        ("from megatron.core.datasets import indexed_dataset", "data", "data/indexed.py"),
        ("from cosmos_posttrain.models import rope\nimport megatron.core", "training", "t.py"),
        ("from cosmos_posttrain.errors import UserError", "geometry", "geometry.py"),
    ],
)
def test_an_allowed_import_passes(source: str, room: str, file: str) -> None:
    assert problems_of(source, room, file, {"infer"}) == []


@pytest.mark.parametrize("path", root_scripts(), ids=lambda path: path.name)
def test_root_scripts_are_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_SCRIPT_LINES


@pytest.mark.parametrize("path", root_scripts(), ids=lambda path: path.name)
def test_root_scripts_guard_their_main(path: Path) -> None:
    # Helper processes that are started afresh import the script again.
    assert 'if __name__ == "__main__":' in path.read_text()


def test_modules_hold_one_idea() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in modules()}
    assert {str(path): n for path, n in lengths.items() if n > MAX_MODULE_LINES} == {}


def test_test_files_have_names_of_their_own() -> None:
    # pytest imports them by name alone, and processes that tests start find them by it.
    names = sorted(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [a for a, b in itertools.pairwise(names) if a == b] == []
