"""``python -m cosmos_posttrain.transfer``: see ``align``."""

from __future__ import annotations

from cosmos_posttrain.cli import parse
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.transfer.align import align
from cosmos_posttrain.transfer.config import FLAGS, AlignConfig


def main() -> None:
    """Parses the command line and counts."""
    program = "python -m cosmos_posttrain.transfer"
    align(parse(AlignConfig, FLAGS, None, program, "Aligns the tokens of two tokenizers."))


if __name__ == "__main__":
    run_cli(main)
