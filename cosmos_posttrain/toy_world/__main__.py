"""``python -m cosmos_posttrain.toy_world``: see ``write``."""

from __future__ import annotations

from cosmos_posttrain.cli import parse
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.toy_world.config import FLAGS, ToyWorldConfig
from cosmos_posttrain.toy_world.write import write_world


def main() -> None:
    """Parses the command line and renders."""
    program = "python -m cosmos_posttrain.toy_world"
    description = "Renders clips of a small world with their truth, captions and actions."
    write_world(parse(ToyWorldConfig, FLAGS, None, program, description))


if __name__ == "__main__":
    run_cli(main)
