"""``python -m cosmos_posttrain.data``: looks at prepared data; see docs/data.md."""

from __future__ import annotations

import sys

from cosmos_posttrain.cli import parse
from cosmos_posttrain.data.config import (
    EXPORT_FLAGS,
    INFO_FLAGS,
    VERIFY_FLAGS,
    ExportConfig,
    InfoConfig,
    VerifyConfig,
    validate,
)
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.launch import run_cli

_PROGRAM = "python -m cosmos_posttrain.data"
_COMMANDS = {
    "info": "Prints the contract of a data set and how much it holds.",
    "verify": "Compares every file of a data set with the hashes in its manifest.",
    "export": "Writes imported data of the 1X World Model Challenge as 1X ships them.",
}


def main() -> None:
    """Picks the command, parses its flags and runs it."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in ("-h", "--help"):
        lines = [f"  {name:<8}{text}" for name, text in _COMMANDS.items()]
        print("\n".join([f"usage: {_PROGRAM} COMMAND --data_path D", "", "commands:", *lines]))
    elif name == "info":
        opened = parse(InfoConfig, INFO_FLAGS, rest, f"{_PROGRAM} info", _COMMANDS[name])
        from cosmos_posttrain.data.info import info

        info(opened)
    elif name == "verify":
        verified = parse(VerifyConfig, VERIFY_FLAGS, rest, f"{_PROGRAM} verify", _COMMANDS[name])
        from cosmos_posttrain.data.verify import verify

        verify(verified)
    elif name == "export":
        config = parse(ExportConfig, EXPORT_FLAGS, rest, f"{_PROGRAM} export", _COMMANDS[name])
        validate(config)
        from cosmos_posttrain.prepare.onex.exporting import export_onex

        export_onex(config.data_path, config.output_dir)
    else:
        problem = f"there is no command {name!r}" if name else "a command is missing"
        raise ConfigError(f"{problem}; use {_PROGRAM} {' or '.join(_COMMANDS)}.")


if __name__ == "__main__":
    run_cli(main)
