"""``python -m cosmos_posttrain.reproduce LIST|NAME ...``; see docs/evaluation.md."""

from __future__ import annotations

import itertools
import sys

from cosmos_posttrain.cli import parse
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.reproduce.config import FLAGS, ReproduceConfig
from cosmos_posttrain.reproduce.figures import choose, load_figures, table

_PROGRAM = "python -m cosmos_posttrain.reproduce"


def main() -> None:
    """Prints the list, or remakes the figures that are named."""
    names = list(itertools.takewhile(lambda item: not item.startswith("-"), sys.argv[1:]))
    config = parse(
        ReproduceConfig,
        FLAGS,
        sys.argv[1 + len(names) :],
        f"{_PROGRAM} LIST|NAME ...",
        "Remakes figures of the documents and says whether they hold on this machine; LIST names "
        "them.",
    )
    figures = load_figures()
    if [name.lower() for name in names] == ["list"]:
        print(table(figures))
    else:
        from cosmos_posttrain.reproduce.run import run

        run(choose(figures, names), config)


if __name__ == "__main__":
    run_cli(main)
