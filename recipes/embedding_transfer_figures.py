"""Tables and plot of recipes/embedding_transfer.sh: validation loss by kind of start."""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from cosmos_posttrain import files
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.evaluation.figures import read_metrics
from cosmos_posttrain.launch import run_cli

ARMS = {
    "ceiling": "rows that a long run ended with",
    "aligned": "rows aligned by co-occurrence",
    "aligned_first": "aligned, rows alone at first",
    "keep": "the old rows as they are",
    "keep_first": "keep, rows alone at first",
    "omp": "sparse combinations of anchors",
    "digits": "regression on FSQ digits",
    "reset": "fresh rows",
    "fresh": "fresh weights throughout",
}
COLORS = {"ceiling": "black", "aligned": "C0", "keep": "C1", "omp": "C2", "digits": "C4"}
COLORS |= {"reset": "C5", "fresh": "C3"}
TOKENS_PER_STEP = 2 * 720
NUM_COLUMNS = 4
Curve = dict[int, float]


@dataclass(frozen=True)
class World:
    """The runs on one kind of clips.

    Attributes:
        title: what the clips are.
        curves: validation loss by start, seed and number of steps; the same seeds for all starts.
    """

    title: str
    curves: dict[str, dict[int, Curve]]

    @property
    def steps(self) -> list[int]:
        """After which all runs were validated."""
        every = [set(curve) for runs in self.curves.values() for curve in runs.values()]
        return sorted(set.intersection(*every))

    def average(self, arm: str) -> Curve:
        """Of the seeds."""
        runs = self.curves[arm].values()
        return {n: mean(run[n] for run in runs) for n in self.steps}


def read_world(folder: Path, title: str) -> World | None:
    """The starts whose runs have ended for every seed that ``keep`` has; None without any."""
    runs: dict[str, dict[int, Curve]] = {}
    for run in sorted(folder.glob("seed_*/*")):
        if run.name in ARMS and (run / "default" / "metrics.jsonl").is_file():
            seed = int(run.parent.name.removeprefix("seed_"))
            runs.setdefault(run.name, {})[seed] = {
                row["step"] + 1: row["val_loss"]
                for row in read_metrics(run)
                if row.get("val_loss") is not None
            }
    last = max((n for each in runs.values() for run in each.values() for n in run), default=0)
    ended = {
        arm: {seed: run for seed, run in each.items() if last in run} for arm, each in runs.items()
    }
    seeds = set(ended.get("keep", {}))
    if not seeds:
        return None
    whole = {
        arm: {seed: ended[arm][seed] for seed in sorted(seeds)}
        for arm in ARMS
        if seeds <= set(ended.get(arm, {}))
    }
    if missing := sorted(set(runs) - set(whole)):
        print(f"{title}: not ended yet for every seed, and left out: {', '.join(missing)}")
    return World(title, whole)


def steps_to(curve: Curve, wanted: float) -> float | None:
    """Where a curve first comes down to a loss, on a straight line between two validations."""
    before: tuple[int, float] | None = None
    for n, loss in sorted(curve.items()):
        if loss <= wanted:
            if before is None:
                return n
            part = (before[1] - wanted) / (before[1] - loss)
            return before[0] + part * (n - before[0])
        before = n, loss
    return None


def losses(world: World) -> list[str]:
    """Markdown: the mean over seeds after so many steps, and every seed at the end."""
    seeds, steps = list(world.curves["keep"]), world.steps
    chosen = _chosen(steps)
    heads = [f"{n} steps, {n * TOKENS_PER_STEP / 1000:.0f}k tokens" for n in chosen]
    lines = _head(f"{world.title}: start", [*heads, f"seeds {_listed(seeds)} at the end"])
    for arm, runs in world.curves.items():
        average = world.average(arm)
        ends = ", ".join(f"{runs[seed][steps[-1]]:.3f}" for seed in seeds)
        lines.append(_row(arm, [*(f"{average[n]:.3f}" for n in chosen), ends]))
    return lines


def leads(world: World) -> list[str]:
    """Markdown: after how many steps a start has the loss that ``keep`` has after so many."""
    seeds, steps = list(world.curves["keep"]), world.steps
    chosen = [n for n in _chosen(steps) if n > steps[0]]
    keep = world.average("keep")
    heads = [f"as keep after {n}" for n in chosen]
    last = f"as keep after {steps[-1]}: seeds {_listed(seeds)}"
    lines = _head(f"{world.title}: steps until", [*heads, last])
    for arm, runs in world.curves.items():
        cells = [_count(steps_to(world.average(arm), keep[n])) for n in chosen]
        by_seed = [
            _count(steps_to(runs[seed], world.curves["keep"][seed][steps[-1]])) for seed in seeds
        ]
        lines.append(_row(arm, [*cells, ", ".join(by_seed)]))
    return lines


def generated(folder: Path) -> list[str]:
    """Markdown: how many generated clips still have their ball, and how far off it is in those."""
    found: dict[str, dict[int, str]] = {}
    for path in sorted(folder.glob("generated_*/motion_*.json")):
        arm, seed = path.stem.removeprefix("motion_"), int(path.parent.name.partition("_")[2])
        result = files.read_json(path, UserError, "delete it, and run the recipe again")
        errors = sorted(result["generated"])
        seen = errors[: len(errors) - result["not_found"]]
        error = f", {median(seen):.1f} px" if seen else ""
        found.setdefault(arm, {})[seed] = f"{len(seen)} of {len(errors)}{error}"
    if not found:
        return []
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    lines = _head("ball found in the last frame, median error", [f"seed {seed}" for seed in seeds])
    arms = [arm for arm in ARMS if arm in found]
    return lines + [_row(arm, [found[arm][seed] for seed in seeds]) for arm in arms]


def _chosen(steps: list[int]) -> list[int]:
    places = range(1, NUM_COLUMNS + 1)
    return sorted({steps[0], *(steps[max(i * len(steps) // NUM_COLUMNS, 1) - 1] for i in places)})


def _head(first: str, others: list[str]) -> list[str]:
    return [_row(first, others), f"|{'---|' * (len(others) + 1)}"]


def _row(first: str, others: list[str]) -> str:
    return f"| {first} | {' | '.join(others)} |"


def _listed(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


def _count(steps: float | None) -> str:
    return "-" if steps is None else f"{steps:.0f}"


def plot(worlds: list[World], path: Path) -> None:
    """For each world a thick line for the mean over seeds, a thin one for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(worlds), figsize=(6.4 * len(worlds), 4.8), squeeze=False, layout="constrained"
    )
    for axis, world in zip(axes[0], worlds, strict=True):
        for arm in world.curves:
            kind, _, variant = arm.partition("_")
            color, style = COLORS[kind], "--" if variant else "-"
            steps, values = world.steps, list(world.average(arm).values())
            for run in world.curves[arm].values():
                axis.plot(steps, [run[n] for n in steps], color=color, lw=0.5, alpha=0.4)
            label = f"{arm}: {ARMS[arm]}"
            axis.plot(steps, values, style, color=color, lw=2, label=label)
        end = world.average("keep")[world.steps[-1]]
        axis.axhline(end, color="black", lw=0.8, ls=":")
        axis.annotate("where keep ends", (world.steps[0], end), va="top", fontsize=8)
        axis.set_yscale("log")
        axis.set_ylim(*_limits(world))
        low, high = axis.get_ylim()
        axis.set_yticks([n / 4 for n in range(60) if low <= n / 4 <= high])
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("optimizer steps on the new tokens")
        axis.set_ylabel("validation loss (nats per token)")
        seeds = len(world.curves["keep"])
        axis.set_title(f"{world.title}, {seeds} seed{'s' * (seeds > 1)} and their mean")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        above = axis.secondary_xaxis(
            "top",
            functions=(
                lambda n: n * TOKENS_PER_STEP / 1000,
                lambda tokens: tokens * 1000 / TOKENS_PER_STEP,
            ),
        )
        above.set_xlabel("thousands of tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def _limits(world: World) -> tuple[float, float]:
    """All runs, and a little room."""
    values: Iterable[float] = [
        curve[n] for runs in world.curves.values() for curve in runs.values() for n in world.steps
    ]
    low, high = min(values), max(values)
    return low - 0.08 * (high - low), high + 0.05 * (high - low)


def main() -> None:
    """Reads the finished runs of one folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args()
    found = [
        read_world(args.output / "small", "small world"),
        read_world(args.output / "real", "real clips"),
    ]
    worlds = [world for world in found if world is not None]
    if not worlds:
        raise UserError(f"{args.output} holds no finished run of keep; let the script finish one.")
    tables = [part(world) for world in worlds for part in (losses, leads)]
    tables.append(generated(args.output / "small"))
    text = "\n\n".join("\n".join(lines) for lines in tables if lines)
    files.write_text(args.output / "embedding_transfer.md", text + "\n")
    print(text)
    plot(worlds, args.figure)
    print(f"\nwrote {args.figure}")


if __name__ == "__main__":
    run_cli(main)
