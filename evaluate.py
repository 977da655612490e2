"""Measures tokenizers, models and clips, and shows what training made; see docs/evaluation.md."""

from __future__ import annotations

import importlib
import sys

from cosmos_posttrain.cli import parse
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.evaluation.commands import COMMANDS
from cosmos_posttrain.launch import run_cli


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: evaluate.py COMMAND [flags]", "", "commands:", *lines, "", "COMMAND --help: flags"]
    )


def main() -> None:
    """Picks the command, parses its flags and runs it."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in ("-h", "--help"):
        print(_usage())
        return
    if name not in COMMANDS:
        problem = f"there is no command {name!r}" if name else "a command is missing"
        raise ConfigError(f"{problem}; use evaluate.py {' or '.join(COMMANDS)}.")
    command = COMMANDS[name]
    config = parse(command.config_class, command.flags, rest, f"evaluate.py {name}", command.help)
    importlib.import_module(command.module).run(config)


if __name__ == "__main__":
    run_cli(main)
