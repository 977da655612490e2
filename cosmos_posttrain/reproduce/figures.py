"""What can be remade, as ``figures.yaml`` has it.

Flows in: the file. Flows out: ``Figure``s, and whether a command's output has their values.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from cosmos_posttrain.errors import ConfigError


@dataclass(frozen=True)
class Value:
    """A number that a command prints.

    Attributes:
        what: in words.
        pattern: a regular expression whose first group is the number.
        value: as the document has it; None where the document has no number for it.
        tolerance: largest distance to ``value``; None where one of the next two decides.
        at_least: smallest number that will do.
        at_most: largest number that will do.
    """

    what: str
    pattern: str
    value: float | None = None
    tolerance: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    def find(self, text: str) -> float | None:
        """The number in a command's output, the last one; None where there is none."""
        matches = list(re.finditer(self.pattern, text, re.MULTILINE))
        return float(matches[-1][1]) if matches else None

    def holds(self, found: float | None) -> bool:
        """Whether a number that was found will do."""
        if found is None:
            return False
        if self.tolerance is not None:
            assert self.value is not None
            return abs(found - self.value) <= self.tolerance
        above = self.at_least is None or found >= self.at_least
        return above and (self.at_most is None or found <= self.at_most)

    @property
    def rule(self) -> str:
        """What will do, in words."""
        if self.tolerance is not None:
            return f"{self.value:g} +- {self.tolerance:g}"
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        words = " and ".join(f"{name} {bound:g}" for name, bound in bounds if bound is not None)
        return words if self.value is None else f"{self.value:g} in the document, {words} here"


@dataclass(frozen=True)
class Figure:
    """Something that a document says and a command remakes; fields as in ``figures.yaml``."""

    name: str
    document: str
    command: str
    seed: str
    minutes: float
    values: tuple[Value, ...]
    needs: str | None = None


def load_figures() -> list[Figure]:
    """All figures, in the file's order."""
    text = (resources.files("cosmos_posttrain.reproduce") / "figures.yaml").read_text("utf-8")
    return [_figure(item) for item in yaml.safe_load(text)]


def _figure(item: dict[str, Any]) -> Figure:
    values = tuple(Value(**value) for value in item.pop("values"))
    return Figure(values=values, **(item | {"seed": str(item["seed"])}))


def choose(figures: Sequence[Figure], names: Sequence[str]) -> list[Figure]:
    """Figures by name.

    Raises:
        ConfigError: no name was given, or there is none of that name.
    """
    by_name = {figure.name: figure for figure in figures}
    unknown = [name for name in names if name not in by_name]
    if unknown or not names:
        problem = f"there is no figure {unknown[0]!r}" if unknown else "a name is missing"
        raise ConfigError(f"{problem}; use LIST, or {', '.join(by_name)}.")
    return [by_name[name] for name in names]


def table(figures: Sequence[Figure]) -> str:
    """All figures for people to read."""
    blocks = []
    for figure in figures:
        lines = [
            f"{figure.name}  ({figure.document}, about {figure.minutes:g} min)",
            f"    {figure.command}",
            f"    seed: {figure.seed}",
        ]
        if figure.needs:
            lines.append(f"    needs {figure.needs}")
        lines += [f"    {value.what}: {value.rule}" for value in figure.values]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
