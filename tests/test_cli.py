"""Command lines: defaults < YAML < flags < overrides; help from the docstrings, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR, run_script

from cosmos_posttrain.cli import Flag, build_parser, flag_names, parse
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.errors import ConfigError


@dataclass
class Inner:
    """Numbers.

    Attributes:
        lr: learning rate.
        steps: of the run.
    """

    lr: float = 0.1
    steps: int | None = None


@dataclass
class Outer:
    """Settings.

    Attributes:
        name: a name.
        fast: 100% fast.
        shape: of something.
        inner: numbers.
        words: some words.
    """

    name: str = setting("default", choices=("default", "a", "b"))
    fast: bool = False
    shape: list[int] = field(default_factory=lambda: [1, 2])
    inner: Inner = field(default_factory=Inner)
    words: list[str] = field(default_factory=list)


FLAGS = (
    Flag("--name", aliases=("--title",)),
    Flag("--fast"),
    Flag("--lr", "inner.lr"),
    Flag("--steps", "inner.steps", "in other words"),
    Flag("--word", "words"),
)


def _parse(*argv: str) -> Outer:
    return parse(Outer, FLAGS, argv, "prog", "A test.")


def test_later_beats_earlier(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("name: a\ninner: {lr: 0.2, steps: 3}\n")
    assert _parse() == Outer()
    assert _parse("--config", str(file)) == Outer("a", inner=Inner(0.2, 3))
    from_flag = _parse("--config", str(file), "--lr", "0.3", "--title", "b", "--fast")
    assert from_flag == Outer("b", True, inner=Inner(0.3, 3))
    overridden = _parse("inner.lr=0.4", "--lr", "0.3", "shape=[4]", "--config", str(file))
    assert overridden == Outer("a", shape=[4], inner=Inner(0.4, 3))


def test_a_flag_of_a_list_is_given_once_for_each_item(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("words: [one]\n")
    assert _parse("--word", "a b", "--word", "c,d").words == ["a b", "c,d"]
    assert _parse("--config", str(file)).words == ["one"]
    assert _parse("--config", str(file), "--word", "two").words == ["two"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--nmae", "a"], "--nmae"),
        (["--lr", "fast"], "--lr"),
        (["inner.speed=1"], "speed"),
        (["inner.steps=many"], "many"),
        (["word"], "neither a flag nor an override"),
        (["--config", "absent.yaml"], "does not exist"),
        (["--na", "a"], "--na"),
    ],
)
def test_what_does_not_fit(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _parse(*argv)


def test_choices_are_shown_and_bind() -> None:
    with pytest.raises(ConfigError, match=r"^--name c is not one of default, a, b\.$"):
        check(_parse("--title", "c"), flag_names(FLAGS))


def test_help_says_what_the_docstrings_say() -> None:
    text = build_parser(Outer, FLAGS, "prog", "A test.").format_help()
    assert "--name {default,a,b}, --title {default,a,b}" in text
    words = " ".join(text.split())
    assert "a name (default: default)" in words
    assert "100% fast (default: False)" in words
    assert "--lr X learning rate (default: 0.1)" in words
    assert "--steps N in other words" in words and "of the run" not in words


# Runs a script's --help and then says which heavy packages came in: what makes help slow.
PROBE = """
import runpy, sys
sys.argv = [*sys.argv[1:], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {"torch", "megatron", "av", "numpy", "transformers"} & set(sys.modules)
print("heavy:", sorted(heavy))
"""


HELPFUL = [
    *((path.name,) for path in sorted(REPOSITORY_DIR.glob("*.py"))),
    *(
        (str(path.relative_to(REPOSITORY_DIR)),)
        for path in sorted(REPOSITORY_DIR.glob("cosmos_posttrain/*/__main__.py"))
    ),
    ("cosmos_posttrain/doctor.py",),
    ("cosmos_posttrain/download.py",),
    *(("cosmos_posttrain/data/__main__.py", name) for name in ("info", "verify", "export")),
    *(("evaluate.py", name) for name in ("loss", "generate", "report", "tokenizer", "onex")),
]


@pytest.mark.parametrize("words", HELPFUL, ids=" ".join)
def test_help_needs_neither_torch_nor_megatron(words: tuple[str, ...]) -> None:
    code = f"import sys; sys.path.insert(0, '.')\n{PROBE}"
    finished = run_script(["-c", code, *words], cwd=REPOSITORY_DIR)
    assert finished.returncode == 0, finished.stderr
    assert "usage:" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "heavy: []"
