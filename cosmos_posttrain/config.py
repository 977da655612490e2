"""Typed configuration: defaults < YAML < flags and overrides, merged by OmegaConf.

Flows in: a dataclass (``<room>/config.py``), an optional YAML file and dotted overrides. Flows out:
an instance of that dataclass, its types checked; and all that is wrong with its values.

A field says everything once: its docstring's ``Attributes`` entry is its help text, ``setting``
holds its choices and range, which bind however a value is given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cosmos_posttrain.errors import ConfigError

T = TypeVar("T")


def merge(
    config_class: type[T],
    config_file: str | Path | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
    dotlist: Sequence[str] = (),
) -> T:
    """Builds a config from its defaults, a YAML file, (key, value) overrides and ``key=value``s.

    Args:
        config_class: a dataclass whose defaults are the starting point.
        config_file: YAML with the same keys; it may leave any of them out.
        overrides: dotted keys with values, applied after the file.
        dotlist: ``key=value`` strings, applied last; values are read as YAML.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a file that cannot be read.
    """
    tree = OmegaConf.structured(config_class)
    with _sentences(f"--config {config_file}"):
        if config_file is not None:
            tree = OmegaConf.merge(tree, _load(Path(config_file)))
    for key, value in overrides:
        with _sentences(key):
            OmegaConf.update(tree, key, value, merge=False)
    for item in dotlist:
        if not re.match(r"[^=\[\]\s]+=", item):
            raise ConfigError(f"{item!r} is neither a flag nor an override; write key=value.")
        with _sentences(item):
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([item]))
    with _sentences("the configuration"):
        return cast(T, OmegaConf.to_object(tree))


def _load(path: Path) -> Any:
    """The file's tree; an empty file sets nothing."""
    if not path.is_file():
        raise ConfigError(f"--config {path} does not exist; name a YAML file.")
    try:
        tree = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no YAML of keys and values"
        raise ConfigError(f"--config {path} cannot be read: {reason}.") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"--config {path} is a list; write key: value, one a line.")
    return tree


@contextlib.contextmanager
def _sentences(what: str) -> Iterator[None]:
    """Turns what OmegaConf and its YAML reader raise into one sentence about ``what``."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        where = f" ({key})" if key and not what.startswith(str(key)) else ""
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ConfigError(f"{what} does not fit{where}: {reason}.") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).strip().splitlines()[0]
        raise ConfigError(f"{what} does not fit: it is no YAML{where}: {reason}.") from error


def to_dict(config: object) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def to_yaml(config: object) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


# What a field allows.


@dataclasses.dataclass(frozen=True)
class Rule:
    """What values a setting may have; None may be, where the type allows it."""

    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence; None if nothing is."""
        if value is None:
            return None
        if self.choices:
            allowed = ", ".join(self.choices)
            return None if value in self.choices else f"is not one of {allowed}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        for bound, holds, words in (
            (self.at_least, lambda b: value >= b, "at least"),
            (self.above, lambda b: value > b, "above"),
            (self.at_most, lambda b: value <= b, "at most"),
            (self.below, lambda b: value < b, "below"),
        ):
            if bound is not None and not holds(bound):
                return f"must be {words} {bound:.12g}"
        return None


def setting(
    default: Any,
    *,
    choices: Sequence[str] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with a default and a rule for its values."""
    rule = Rule(tuple(choices), at_least, above, at_most, below)
    return dataclasses.field(default=default, metadata={"rule": rule})


def _settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Rule]]:
    """(dotted key, value, rule) of every setting below a config that is not at its default."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{item.name}.")
        elif "rule" in item.metadata and value != item.default:
            yield f"{prefix}{item.name}", value, item.metadata["rule"]


def check(config: Any, names: Mapping[str, str] | None = None, more: Sequence[str] = ()) -> None:
    """Names everything that is wrong with a config at once; changes nothing.

    Args:
        config: a dataclass, with further ones in it.
        names: what to call a dotted key, its flag say; see ``cli.flag_names``.
        more: what else was found wrong with it.

    Raises:
        ConfigError: one sentence with all problems.
    """
    problems = [
        f"{(names or {}).get(key, key)} {value} {problem}"
        for key, value, rule in _settings(config)
        if (problem := rule.problem(value))
    ]
    problems += more
    if problems:
        raise ConfigError("; ".join(problems) + ".")


def rule_of(config_class: type, key: str) -> Rule:
    """The rule of a dotted key."""
    *parents, last = key.split(".")
    value: Any = config_class()
    for parent in parents:
        value = getattr(value, parent)
    items = {item.name: item for item in dataclasses.fields(value)}
    rule: Rule = items[last].metadata.get("rule", Rule())
    return rule


def documentation(config_class: type) -> dict[str, str]:
    """The text of each field's entry under ``Attributes`` in a config class's docstring.

    A class that adds to another one documents what it adds.
    """
    found: dict[str, str] = {}
    for parent in reversed(config_class.__mro__[:-1]):
        found |= _entries(parent.__doc__ or "")
    return found


def _entries(docstring: str) -> dict[str, str]:
    # Python 3.13 strips the indentation of docstrings, earlier ones do not.
    lines = inspect.cleandoc(docstring).partition("Attributes:")[2].splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        entry = re.fullmatch(r" {4}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.startswith(" " * 8):
            found[name] += " " + line.strip()
        elif line.strip() and not line.startswith(" " * 4):
            break
    return {name: text.replace("``", "").rstrip(".") for name, text in found.items()}
