"""Converts a checkpoint into another form; see docs/checkpoints.md."""

from __future__ import annotations

from cosmos_posttrain.checkpoint.config import FLAGS, CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.cli import parse
from cosmos_posttrain.launch import run_cli


def main() -> None:
    """Parses the command line and converts."""
    description = "Converts a checkpoint into another form; see docs/checkpoints.md."
    convert(parse(CheckpointConversionConfig, FLAGS, None, "convert_checkpoint.py", description))


if __name__ == "__main__":
    run_cli(main)
