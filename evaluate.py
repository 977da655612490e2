"""Measures tokenizers and models, and shows what training made; see docs/evaluation.md."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.evaluation.config import loss, onex, report, tokenizer
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
    "loss": Command(
        "How well a model foresees the tokens of held-out clips, beside baselines.",
        loss.LossEvalConfig,
        loss.FLAGS,
        "cosmos_posttrain.evaluation.loss",
    ),
    "tokenizer": Command(
        "PSNR, SSIM, codebook use and speed of a video tokenizer, with a contact sheet.",
        tokenizer.TokenizerEvalConfig,
        tokenizer.FLAGS,
        "cosmos_posttrain.evaluation.tokenizer",
    ),
    "onex": Command(
        "Loss of a model on windows of the 1X World Model Challenge, and a submission.",
        onex.OnexEvalConfig,
        onex.FLAGS,
        "cosmos_posttrain.evaluation.onex.command",
    ),
    "report": Command(
        "One page about training runs and their evaluations, for any browser.",
        report.ReportConfig,
        report.FLAGS,
        "cosmos_posttrain.evaluation.report.command",
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
