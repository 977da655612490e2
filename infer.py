"""Generates the rest of a clip from an image or a video's first frames; see docs/inference.md."""

from __future__ import annotations

from cosmos_posttrain.cli import parse
from cosmos_posttrain.inference.config import FLAGS, InferConfig
from cosmos_posttrain.launch import run_cli


def main() -> None:
    """Parses the command line and generates."""
    config = parse(
        InferConfig,
        FLAGS,
        None,
        "infer.py",
        "Generates the rest of a clip from an image or the first frames of a video.",
    )
    from cosmos_posttrain.inference.batch import run

    run(config)


if __name__ == "__main__":
    run_cli(main)
