"""Markdown of ``evaluate.py loss``: a model beside its baselines; fails where one is not beaten."""

import argparse
import json
from pathlib import Path

from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.launch import run_cli


def rows(path: Path) -> list[str]:
    """A row for the model and each baseline.

    Raises:
        CosmosPosttrainError: a baseline's interval of its distance to the model reaches 0.
    """
    metrics = json.loads(path.read_text())
    figures, lines = metrics["figures"], []
    tokenizer = metrics["settings"]["tokenizer"]["id"]
    for name, row in {"model": figures, **figures["baselines"]}.items():
        low, high = row["ci95"]["nats_per_token"]
        above = "" if name == "model" else f"{row['nats_above_model']:+.3f}"
        if name != "model" and row["nats_above_model_ci95"][0] <= 0:
            raise CosmosPosttrainError(
                f"in {path} the model does not beat {name}: {row['nats_above_model']:+.4f} nats, "
                f"95% interval {row['nats_above_model_ci95']}."
            )
        lines.append(
            f"| {tokenizer} | {name} | {row['nats_per_token']:.3f} | {low:.3f} to {high:.3f} "
            f"| {above} | {row['perplexity']:,.1f} | {row['top_1']:.1%} | {row['top_5']:.1%} |"
        )
    return lines


def main() -> None:
    """Prints one table of several results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="files of evaluate.py loss")
    args = parser.parse_args()
    heads = "tokens | | nats/token | 95% interval | above the model | perplexity | top-1 | top-5"
    print(f"| {heads} |\n|{'---|' * 8}")
    for path in args.results:
        print("\n".join(rows(path)))


if __name__ == "__main__":
    run_cli(main)
