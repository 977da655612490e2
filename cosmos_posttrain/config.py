"""Typed configuration: defaults < YAML < flags and overrides, merged by OmegaConf.

Flows in: a dataclass (``<room>/config.py``), an optional YAML file and dotted overrides. Flows out:
an instance of that dataclass, its types checked; and all that is wrong with its values.

A field says everything once: its docstring's ``Attributes`` entry is its help text, ``setting``
holds its choices and range, which bind however a value is given.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cosmos_posttrain.errors import ConfigError

T = TypeVar("T")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


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
    try:
        if config_file is not None:
            if not Path(config_file).is_file():
                raise ConfigError(f"--config {config_file} does not exist; name a YAML file.")
            tree = OmegaConf.merge(tree, OmegaConf.load(config_file))
        for key, value in overrides:
            OmegaConf.update(tree, key, value, merge=False)
        for item in dotlist:
            if "=" not in item:
                raise ConfigError(f"{item!r} is neither a flag nor an override; write key=value.")
        if dotlist:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(dotlist)))
        return cast(T, OmegaConf.to_object(tree))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"the configuration does not fit: {_first_line(error)}.") from error


def to_dict(config: object) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def to_yaml(config: object) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


# What a field allows.


@dataclasses.dataclass(frozen=True)
class Rule:
    """What values a setting may have; None, where the field allows it, always may."""

    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, as the end of a sentence; None if nothing is."""
        if value is None or value == "":
            return None  # not given
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
                return f"must be {words} {bound:g}"
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
    """(dotted key, value, rule) of every setting below a config."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{item.name}.")
        elif "rule" in item.metadata:
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
    lines = docstring.partition("Attributes:")[2].splitlines()
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        entry = re.fullmatch(r" {8}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.startswith(" " * 12):
            found[name] += " " + line.strip()
        elif line.strip() and not line.startswith(" " * 8):
            break
    return {name: text.replace("``", "").rstrip(".") for name, text in found.items()}
