"""The section on how training went.

Flows in: ``ReportedRun``s. Flows out: a ``Section`` with the curves of all and a table of each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cosmos_posttrain.evaluation.report import curves as c
from cosmos_posttrain.evaluation.report.charts import Line, LineChart
from cosmos_posttrain.evaluation.report.runs import ReportedRun
from cosmos_posttrain.evaluation.report.section import Section
from cosmos_posttrain.evaluation.report.tables import Table, cell, mark_best, number

_TABLE_ROWS = 12
_STEPS = "optimizer steps"
_COLUMNS = {
    c.LOSS: "training loss",
    c.VALIDATION: "validation loss",
    c.RATE: "learning rate",
    c.NORM: "gradient norm",
    c.SPEED: "tokens/s",
}


def training_section(runs: list[ReportedRun]) -> Section:
    """Curves of all runs on common axes, and a table of each."""
    charts = [
        LineChart(
            "training-loss",
            "Loss",
            _STEPS,
            "nats per token",
            _loss_lines(runs),
            _described(runs, c.LOSS, "Training loss")
            + _described(runs, c.VALIDATION, "Validation"),
        ),
        _chart(runs, c.RATE, "learning-rate", "Learning rate", "", smooth=False),
        _chart(runs, c.NORM, "gradient-norm", "Gradient norm", "before clipping", may_be_log=True),
        _chart(runs, c.SPEED, "throughput", "Throughput", "tokens per second"),
    ]
    return Section(
        "training",
        "Training",
        "Faint lines are single steps, or means of neighbouring steps in a long run; strong lines "
        "are smoothed over a fifteenth of the run.",
        [chart for chart in charts if any(len(line.x) for line in chart.lines)],
        [_table(run, len(runs) > 1) for run in runs],
    )


def colour_of(place: int) -> int:
    """The colour of a run."""
    return place + 1


def _loss_lines(runs: list[ReportedRun]) -> list[Line]:
    lines = []
    for place, run in enumerate(runs):
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        colour = colour_of(place)
        lines += _both(run, c.LOSS, f"{prefix}training", colour)
        if len(curve := run.curves.of[c.VALIDATION].thinned()):
            dots = colour if len(runs) > 1 else colour + 1
            lines.append(Line(f"{prefix}validation", curve.steps, curve.values, dots, "dots"))
    return lines


def _both(run: ReportedRun, quantity: str, label: str, colour: int) -> list[Line]:
    """The curve as it is, faint, and smoothed."""
    curve = run.curves.of[quantity]
    thin, smooth = curve.thinned(), curve.smoothed().thinned()
    if not len(curve):
        return []
    return [
        Line("", thin.steps, thin.values, colour, "faint"),
        Line(label, smooth.steps, smooth.values, colour),
    ]


def _chart(
    runs: list[ReportedRun],
    quantity: str,
    name: str,
    title: str,
    unit: str,
    smooth: bool = True,
    may_be_log: bool = False,
) -> LineChart:
    lines: list[Line] = []
    for place, run in enumerate(runs):
        label = run.name if len(runs) > 1 else ""
        if smooth:
            lines += _both(run, quantity, label, colour_of(place))
        elif len(curve := run.curves.of[quantity].thinned()):
            lines.append(Line(label, curve.steps, curve.values, colour_of(place)))
    description = _described(runs, quantity, title)
    return LineChart(name, title, _STEPS, unit, lines, description, may_be_log)


def _described(runs: list[ReportedRun], quantity: str, what: str) -> str:
    """Where each curve begins and ends, in words."""
    sentences = []
    for run in runs:
        curve = run.curves.of[quantity]
        if not len(curve):
            continue
        few = max(len(curve) // 20, 1)
        start, end = curve.mean(0, few), curve.mean(len(curve) - few, len(curve))
        who = f" of {run.name}" if len(runs) > 1 else ""
        sentences.append(
            f"{what}{who} goes from {number(start)} at step {curve.steps[0]:,.0f} to "
            f"{number(end)} at step {curve.steps[-1]:,.0f}. "
        )
    return "".join(sentences)


def _table(run: ReportedRun, has_others: bool) -> Table:
    kept = [name for name in _COLUMNS if len(run.curves.of[name])]
    rows = []
    last = 0
    for step in c.shown_steps(run.curves, _TABLE_ROWS):
        cells = [cell(step)]
        for name in kept:
            value = run.curves.at(name, step)
            if name in (c.LOSS, c.SPEED):  # of a single step they say little
                value = _mean_between(run.curves.of[name], last, step)
            cells.append(cell(value))
        rows.append(cells)
        last = step
    if c.VALIDATION in kept:
        mark_best(rows, 1 + kept.index(c.VALIDATION), lowest=True)
    return Table(
        f"{run.name}: numbers" if has_others else "Numbers",
        ["step", *(_COLUMNS[name] for name in kept)],
        rows,
        "Training loss and tokens/s are means since the row before.",
        is_open=False,
    )


def _mean_between(curve: c.Curve, after: float, until: float) -> float | None:
    first, last = np.searchsorted(curve.steps, [after, until], side="right")
    return curve.mean(int(first), int(last)) if last > first else None


def lowest_validation(run: ReportedRun) -> tuple[float, float] | None:
    """(step, loss) of the lowest validation loss; None where nothing was validated."""
    return _extreme(run, lambda values: int(values.argmin()))


def last_validation(run: ReportedRun) -> tuple[float, float] | None:
    """(step, loss) of the last validation."""
    return _extreme(run, lambda values: len(values) - 1)


def _extreme(run: ReportedRun, pick: Callable[[np.ndarray], int]) -> tuple[float, float] | None:
    curve = run.curves.of[c.VALIDATION]
    if not len(curve):
        return None
    place = pick(curve.values)
    return float(curve.steps[place]), float(curve.values[place])


def final_loss(run: ReportedRun) -> float | None:
    """Mean training loss of the last twentieth of the steps."""
    curve = run.curves.of[c.LOSS]
    return curve.mean(-max(len(curve) // 20, 1), len(curve)) if len(curve) else None


def usual_speed(run: ReportedRun) -> float | None:
    """Median of the tokens a second."""
    curve = run.curves.of[c.SPEED]
    return float(np.median(curve.values)) if len(curve) else None
