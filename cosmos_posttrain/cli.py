"""Command lines: one table maps each flag to a dotted config key and generates ``--help``.

Flows in: ``sys.argv``, a table of ``Flag``s and the task's config dataclass. Flows out: a resolved
config. ``--config FILE`` and ``key=value`` overrides work in every script; later beats earlier
in the order defaults < YAML < flags < overrides.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from cosmos_posttrain import config
from cosmos_posttrain.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Flag:
    """One flag of a script.

    Attributes:
        name: as typed, such as ``--lr``.
        key: the dotted key of the config that it sets, such as ``optimizer.lr``; "" is the flag's
            own name.
        help: replaces the text of the config's docstring; the default is added from the config.
        aliases: other spellings.
        takes_many: whether all words up to the next flag are its values.

    Another flag of a list is given once for each item.
    """

    name: str
    key: str = ""
    help: str = ""
    aliases: tuple[str, ...] = ()
    takes_many: bool = False

    @property
    def target(self) -> str:
        """The dotted key."""
        return self.key or self.name.lstrip("-")


def flag_names(flags: Sequence[Flag]) -> dict[str, str]:
    """What a dotted key is called on the command line."""
    return {flag.target: flag.name for flag in flags}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; run with --help to see the flags.")


def _field_type_and_default(config_class: type, key: str) -> tuple[Any, Any]:
    """Walks a dotted key through nested dataclasses."""
    value: Any = config_class()
    kind: Any = config_class
    for part in key.split("."):
        kind = typing.get_type_hints(kind if isinstance(kind, type) else type(value))[part]
        value = getattr(value, part)
    return kind, value


def _plain_type(kind: Any) -> Any:
    """``int`` for ``int | None``; lists stay as they are."""
    arguments = [a for a in typing.get_args(kind) if a is not type(None)]
    if type(None) in typing.get_args(kind) and len(arguments) == 1:
        return arguments[0]
    return kind


def _describe(flag: Flag, config_class: type, default: Any) -> str:
    text = flag.help or _documented(config_class, flag.target)
    if default in (None, "", []) or dataclasses.is_dataclass(default):
        return text.replace("%", "%%")
    if isinstance(default, list):
        default = ",".join(str(item) for item in default)
    return f"{text} (default: {default})".replace("%", "%%")


def _documented(config_class: type, key: str) -> str:
    """The entry of a dotted key in the docstring of the dataclass that has it."""
    *parents, last = key.split(".")
    value: Any = config_class()
    for parent in parents:
        value = getattr(value, parent)
    return config.documentation(type(value)).get(last, "")


def _add(parser: argparse.ArgumentParser, flag: Flag, config_class: type) -> None:
    kind, default = _field_type_and_default(config_class, flag.target)
    kind = _plain_type(kind)
    options: dict[str, Any] = {
        "dest": flag.target,
        "default": argparse.SUPPRESS,
        "help": _describe(flag, config_class, default),
    }
    names = [flag.name, *flag.aliases]
    if kind is bool:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        return
    if typing.get_origin(kind) is list:
        options |= {"action": "extend", "nargs": "+"} if flag.takes_many else {"action": "append"}
    if kind in (int, float):
        options["type"] = kind
    options["metavar"] = {int: "N", float: "X"}.get(kind, "S")
    if choices := config.rule_of(config_class, flag.target).choices:
        # Not argparse's own choices: the config refuses others, however they were given.
        options["metavar"] = "{" + ",".join(choices) + "}"
    parser.add_argument(*names, **options)


def build_parser(
    config_class: type, flags: Sequence[Flag], prog: str, description: str
) -> argparse.ArgumentParser:
    """The parser that ``parse`` uses."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with the config's keys")
    for flag in flags:
        _add(parser, flag, config_class)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="overrides of any config key"
    )
    return parser


def parse(
    config_class: type[T],
    flags: Sequence[Flag],
    argv: Sequence[str] | None,
    prog: str,
    description: str,
) -> T:
    """Parses a command line into a config.

    Raises:
        ConfigError: an unknown flag, a value of the wrong type, or a file that cannot be read.
        SystemExit: with code 0 after ``--help``.
    """
    parser = build_parser(config_class, flags, prog, description)
    given = vars(parser.parse_intermixed_args(argv))
    config_file, dotlist = given.pop("config"), given.pop("overrides")
    return config.merge(config_class, config_file, list(given.items()), dotlist)
