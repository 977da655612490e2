"""Turns videos into token shards for training; see docs/data.md."""

from __future__ import annotations

from cosmos_posttrain.cli import parse
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.prepare.config import FLAGS, PrepareConfig


def main() -> None:
    """Parses the command line and prepares the data set."""
    config = parse(
        PrepareConfig, FLAGS, None, "prepare_dataset.py", "Turns videos into token shards."
    )
    from cosmos_posttrain.prepare.prepare import prepare

    prepare(config)


if __name__ == "__main__":
    run_cli(main)
