"""Measures models, tokenizers and clips; see docs/evaluation.md."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.evaluation.config import tokenbench, tokenizer
from cosmos_posttrain.launch import run_cli


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        help: one line.
        config_class: its settings.
        flags: its flags.
        module: has ``run(config)``; imported when the command is chosen, because it is heavy.
    """

    help: str
    config_class: type
    flags: Sequence[Flag]
    module: str


COMMANDS = {
    "tokenbench": Command(
        "PSNR, SSIM, LPIPS and rFVD of a folder of videos against references of the same names.",
        tokenbench.TokenBenchConfig,
        tokenbench.FLAGS,
        "cosmos_posttrain.evaluation.tokenbench",
    ),
    "tokenizer": Command(
        "PSNR, SSIM, codebook use and speed of a video tokenizer, with a contact sheet.",
        tokenizer.TokenizerEvalConfig,
        tokenizer.FLAGS,
        "cosmos_posttrain.evaluation.tokenizer",
    ),
}


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
