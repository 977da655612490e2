"""Converts a checkpoint into another form; see docs/checkpoints.md."""

from __future__ import annotations

from cosmos_posttrain.checkpoint.convert import FORMATS, ConvertConfig, convert
from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.errors import run_cli

FLAGS = (
    Flag("--source", "source", "Hugging Face id, model.pt folder, checkpoint, or run folder"),
    Flag("--target", "target", "folder to write"),
    Flag("--target_format", "target_format", "what to write", choices=FORMATS),
    Flag("--overwrite", "overwrite", "replace an earlier conversion in the target"),
    Flag("--verify", "verify", "read the result back and compare every tensor with the source's"),
)


def main() -> None:
    """Parses the command line and converts."""
    description = "Converts a checkpoint between model.pt and Megatron's distributed format."
    convert(parse(ConvertConfig, FLAGS, None, "convert_checkpoint.py", description))


if __name__ == "__main__":
    run_cli(main)
