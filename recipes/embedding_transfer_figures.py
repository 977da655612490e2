"""Table and plot of recipes/embedding_transfer.sh: validation loss by kind of start."""

import argparse
from pathlib import Path
from statistics import mean

from cosmos_posttrain.errors import UserError
from cosmos_posttrain.evaluation.figures import read_metrics
from cosmos_posttrain.launch import run_cli

INITS = {
    "aligned": "rows aligned by co-occurrence",
    "keep": "the old rows as they are",
    "reset": "fresh rows",
    "mean": "the mean of the old rows",
    "fresh": "fresh weights throughout",
}
Curves = dict[str, dict[int, dict[int, float]]]


def read_curves(output: Path) -> Curves:
    """Validation loss by start, seed and number of steps; only seeds of which all runs ended."""
    by_seed: dict[int, dict[str, dict[int, float]]] = {}
    for folder in sorted(output.glob("seed_*")):
        runs = {init: folder / init for init in INITS}
        if all((run / "default" / "metrics.jsonl").is_file() for run in runs.values()):
            by_seed[int(folder.name.removeprefix("seed_"))] = {
                init: {
                    row["step"] + 1: row["val_loss"]
                    for row in read_metrics(run)
                    if row.get("val_loss") is not None
                }
                for init, run in runs.items()
            }
    last = max((n for runs in by_seed.values() for run in runs.values() for n in run), default=0)
    ended = [seed for seed, runs in by_seed.items() if all(last in run for run in runs.values())]
    if not ended:
        raise UserError(f"{output} holds no seed with all runs; let the script finish one.")
    return {init: {seed: by_seed[seed][init] for seed in ended} for init in INITS}


def print_table(curves: Curves) -> None:
    """Markdown: mean over seeds after so many steps, and every seed at the end."""
    seeds = sorted(curves["fresh"])
    steps = sorted(set.intersection(*(set(run) for c in curves.values() for run in c.values())))
    heads = [f"{n} steps" for n in steps] + [f"seed {seed}, {steps[-1]} steps" for seed in seeds]
    print(f"| start | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for init, runs in curves.items():
        values = [mean(run[n] for run in runs.values()) for n in steps]
        values += [runs[seed][steps[-1]] for seed in seeds]
        print(f"| {init} | " + " | ".join(f"{value:.3f}" for value in values) + " |")
    print()
    for init in [init for init in INITS if init != "aligned"]:
        for n in (steps[0], steps[-1]):
            gains = [curves[init][seed][n] - curves["aligned"][seed][n] for seed in seeds]
            print(
                f"{init} - aligned after {n} steps: "
                + ", ".join(f"{gain:+.3f}" for gain in gains)
                + f" nats/token by seed, {mean(gains):+.3f} on average"
            )


def plot(curves: Curves, path: Path) -> None:
    """A thick line for the mean over seeds, a thin one for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.0, 4.2))
    for number, (init, runs) in enumerate(curves.items()):
        steps = sorted(next(iter(runs.values())))
        for run in runs.values():
            axis.plot(steps, [run[n] for n in steps], color=f"C{number}", lw=0.7, alpha=0.5)
        values = [mean(run[n] for run in runs.values()) for n in steps]
        axis.plot(steps, values, "o-", color=f"C{number}", ms=3.5, label=f"{init}: {INITS[init]}")
    axis.set_xlabel("optimizer steps on the new tokens")
    axis.set_ylabel("validation loss (nats per token)")
    axis.set_title(f"tiny model, DV8x16x16 -> DV4x8x8, {len(curves['fresh'])} seeds and their mean")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Reads the finished runs of one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args()
    curves = read_curves(args.output)
    print_table(curves)
    plot(curves, args.figure)
    print(f"\nwrote {args.figure}")


if __name__ == "__main__":
    run_cli(main)
