"""Typed configuration: what is merged, what does not fit, and rules that bind however given."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cosmos_posttrain import config
from cosmos_posttrain.config import Rule, check, documentation, merge, setting
from cosmos_posttrain.errors import ConfigError


@dataclass
class Inner:
    """Numbers.

    Attributes:
        lr: learning rate, ``1e-3`` say,
            in two lines.
        steps: of the run.
    """

    lr: float = setting(0.1, above=0)
    steps: int | None = setting(None, at_least=1, at_most=1_000_000)


@dataclass
class Outer:
    """All settings.

    More of them.

    Attributes:
        name: one of three.
        shape: two numbers.
        inner: the numbers.

    Not an attribute: this.
    """

    name: str = setting("", choices=("a", "b"))
    shape: list[int] = field(default_factory=lambda: [1, 2])
    inner: Inner = field(default_factory=Inner)


def write(folder: Path, text: bytes) -> Path:
    (folder / "config.yaml").write_bytes(text)
    return folder / "config.yaml"


def test_the_resolved_config_can_be_read_again(tmp_path: Path) -> None:
    before = Outer("b", shape=[3], inner=Inner(0.5))
    file = write(tmp_path, config.to_yaml(before).encode())
    assert merge(Outer, file) == before
    assert config.to_dict(before)["inner"] == {"lr": 0.5, "steps": None}
    assert merge(Outer, write(tmp_path, b"")) == Outer()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"name: [", "does not fit: it is no YAML in line 1"),
        (b"name: a\nname: b\n", "line 2: found duplicate key name"),
        (b"name: \x00\n", "it is no YAML"),
        (b"name: \xff\xfe\n", "it is no YAML"),
        (b"3\n", "it is no YAML"),
        (b"- 1\n- 2\n", "is a list"),
        (b"inner: 3\n", "does not fit"),
        (b"inner:\n  lr: fast\n", r"does not fit \(inner.lr\): .*'fast'"),
        (b"inner:\n  speed: 1\n", "'speed' not in 'Inner'"),
        (b"shape: [1, b]\n", r"does not fit \(shape\[1\]\): .*'b'"),
        (b"name: ${absent}\n", "absent"),
        (b"name: !!python/object/apply:os.getcwd []\n", "no YAML in line 1"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_the_place(
    tmp_path: Path, text: bytes, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        merge(Outer, write(tmp_path, text))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert ".." not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        merge(Outer, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        merge(Outer, tmp_path)


@pytest.mark.parametrize(
    "word",
    "=3 inner..lr=3 inner.lr= inner.lr=fast shape=3 shape=[1 shape[0]=5 [=3 inner.lr.x=1".split(),
)
def test_an_override_that_does_not_fit_is_named(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        merge(Outer, dotlist=[word])
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_rules_bind_however_a_value_is_given(tmp_path: Path) -> None:
    wrong = r"inner.lr 0.0 must be above 0; inner.steps 1000001 must be at most 1000000\.$"
    file = write(tmp_path, b"inner: {lr: 0, steps: 1000001}")
    for found in (
        merge(Outer, file),
        merge(Outer, dotlist=["inner.lr=0", "inner.steps=1000001"]),
        merge(Outer, overrides=[("inner.lr", 0.0), ("inner.steps", 1000001)]),
        Outer(inner=Inner(0.0, 1000001)),
    ):
        with pytest.raises(ConfigError, match=wrong):
            check(found)


def test_all_problems_come_at_once_under_the_names_of_the_flags() -> None:
    found = Outer("c", inner=Inner(lr=-1))
    with pytest.raises(ConfigError) as caught:
        check(found, {"inner.lr": "--lr"}, ["shape is too long"])
    expected = "name c is not one of a, b; --lr -1 must be above 0; shape is too long."
    assert str(caught.value) == expected


def test_none_and_the_default_are_allowed_but_an_empty_word_is_no_choice() -> None:
    check(Outer())  # "" is this field's default
    assert Rule(("a", "b")).problem("") == "is not one of a, b"
    assert Rule(("a", "b")).problem(None) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_with_a_rule_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="must be a finite number"):
        check(Inner(lr=value))


def test_half_open_ranges() -> None:
    rule = Rule(at_least=0, below=1)
    assert rule.problem(0) is None and rule.problem(0.999) is None
    assert rule.problem(1) == "must be below 1" and rule.problem(-0.1) == "must be at least 0"
    rule = Rule(above=0, at_most=1)
    assert rule.problem(1) is None and rule.problem(0) == "must be above 0"


def test_help_texts_are_the_docstrings() -> None:
    assert documentation(Outer) == {
        "name": "one of three",
        "shape": "two numbers",
        "inner": "the numbers",
    }
    stripped = type("Stripped", (), {"__doc__": inspect.cleandoc(Inner.__doc__ or "")})
    assert documentation(stripped) == documentation(Inner)
    assert documentation(Inner)["lr"] == "learning rate, 1e-3 say, in two lines"
    assert documentation(type("Bare", (), {"__doc__": None})) == {}
