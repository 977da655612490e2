"""``python -m cosmos_posttrain.toy_world``: see ``write``."""

from __future__ import annotations

from cosmos_posttrain.cli import parse
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.toy_world.config import FLAGS, ToyWorldConfig


def main() -> None:
    """Parses the command line and renders."""
    program = "python -m cosmos_posttrain.toy_world"
    description = "Renders clips of a small world with their truth, captions and actions."
    config = parse(ToyWorldConfig, FLAGS, None, program, description)
    from cosmos_posttrain.toy_world.write import write_world

    write_world(config)


if __name__ == "__main__":
    run_cli(main)
