"""The section on held-out loss beside the baselines.

Flows in: ``Evaluation``s of ``evaluate.py loss``. Flows out: a ``Section``: a table, the loss of
each latent frame, and of each place of the grid.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cosmos_posttrain.evaluation.report import shapes
from cosmos_posttrain.evaluation.report.charts import NEUTRAL, Chart, HeatMaps, Line, LineChart
from cosmos_posttrain.evaluation.report.curves import is_number
from cosmos_posttrain.evaluation.report.evaluations import Evaluation
from cosmos_posttrain.evaluation.report.section import Section
from cosmos_posttrain.evaluation.report.tables import (
    Cell,
    Table,
    cell,
    mark_best,
    number,
    table_of_objects,
    words,
)

COMMAND = "loss"
NATS = "nats_per_token"
_FRAMES, _PLACES, _BASELINES = "per_latent_frame", "per_position", "baselines"
_MAX_GRID = 400  # cells of a map that are also written out
_BASELINE_COLOURS = (5, 4, 3, 6, NEUTRAL)


def loss_section(evaluations: list[Evaluation]) -> Section:
    """Everything that the loss evaluations tell."""
    table, charts, tables = _table(evaluations), list[Chart](), list[Table]()
    for place, evaluation in enumerate(evaluations):
        suffix = f": {evaluation.name}" if len(evaluations) > 1 else ""
        parts = _parts(evaluation)
        if chart := _frames_chart(parts, f"latent-frames-{place}", suffix):
            charts.append(chart)
            tables.append(_frames_table(parts, suffix))
        if maps := _maps(parts, f"places-{place}", suffix):
            charts.append(maps)
            values = maps.maps[0][1]
            if values.size <= _MAX_GRID:
                tables.append(_map_table(maps.maps[0][0] + suffix, values))
        if rows := table_of_objects(f"Every clip{suffix}", evaluation.rows):
            tables.append(rows)
    return Section(
        "loss",
        "Loss on held-out clips",
        "Cross-entropy of every token, the right ones before it given. A model is of use where it "
        "stays below the baselines, which know no network.",
        charts,
        [table, *tables],
    )


def nats(figures: dict[str, Any]) -> float | None:
    """Mean loss."""
    value = figures.get(NATS)
    return float(value) if is_number(value) else None


def best_baseline(evaluation: Evaluation) -> tuple[str, float] | None:
    """(name, nats per token) of the baseline with the lowest loss."""
    baselines = evaluation.figures.get(_BASELINES)
    found = [
        (value, name)
        for name, figures in (baselines.items() if isinstance(baselines, dict) else ())
        if isinstance(figures, dict) and (value := nats(figures)) is not None
    ]
    return (min(found)[1], min(found)[0]) if found else None


def _parts(evaluation: Evaluation) -> list[tuple[str, dict[str, Any]]]:
    """The model's figures and each baseline's."""
    baselines = evaluation.figures.get(_BASELINES)
    others = baselines.items() if isinstance(baselines, dict) else ()
    return [
        ("model", evaluation.figures),
        *((words(name), figures) for name, figures in others if isinstance(figures, dict)),
    ]


def _table(evaluations: list[Evaluation]) -> Table:
    """A row for each model and each of its baselines, a column a scalar."""
    named: list[tuple[str, dict[str, Any]]] = []
    for evaluation in evaluations:
        for name, figures in _parts(evaluation):
            several = len(evaluations) > 1
            named.append((f"{evaluation.name}: {name}" if several else name, figures))
    known = (*shapes.LOWER, *shapes.HIGHER)
    keys = list(dict.fromkeys(k for _, f in named for k, v in f.items() if is_number(v)))
    keys = [key for key in known if key in keys]
    rows = []
    for name, figures in named:
        values = [figures.get(key) for key in keys]
        cells = [Cell(name, name), *(cell(v if is_number(v) else None) for v in values)]
        rows.append([*cells, _interval_cell(figures)])
    for column, key in enumerate(keys, start=1):
        if shapes.is_known(key):
            mark_best(rows, column, lowest=key in shapes.LOWER)
    heads = ["", *map(words, keys), "95% interval of the nats"]
    if not any(row[-1].value is not None for row in rows):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    return Table("The model beside its baselines", heads, rows)


def _interval(figures: dict[str, Any], key: str, name: str = "") -> tuple[float, float] | None:
    """The ends of a confidence interval; None where it was not computed."""
    value = figures.get(key)
    if name and isinstance(value, dict):
        value = value.get(name)
    if isinstance(value, list) and len(value) == 2 and all(map(is_number, value)):
        return float(value[0]), float(value[1])
    return None


def _interval_cell(figures: dict[str, Any]) -> Cell:
    ends = _interval(figures, "ci95", NATS)
    return cell(None) if ends is None else Cell(f"{ends[0]:.3f} to {ends[1]:.3f}", ends[0])


def is_gap_certain(evaluation: Evaluation, baseline: str) -> bool | None:
    """Whether the model's distance to a baseline is more than chance; None if that is unknown."""
    baselines = evaluation.figures.get(_BASELINES)
    figures = baselines.get(baseline) if isinstance(baselines, dict) else None
    ends = _interval(figures, "nats_above_model_ci95") if isinstance(figures, dict) else None
    return None if ends is None else not ends[0] <= 0 <= ends[1]


def _frame_values(figures: dict[str, Any]) -> list[float] | None:
    """Nats per token of each latent frame; NaN where nothing is predicted."""
    value = figures.get(_FRAMES)
    if isinstance(value, dict):
        value = value.get(NATS)
    if not isinstance(value, list):
        return None
    numbers = [item.get(NATS) if isinstance(item, dict) else item for item in value]
    found = [float(item) if is_number(item) else float("nan") for item in numbers]
    return found if np.isfinite(found).any() else None


def _frames_chart(
    parts: list[tuple[str, dict[str, Any]]], name: str, suffix: str
) -> LineChart | None:
    lines = []
    for place, (label, figures) in enumerate(parts):
        values = _frame_values(figures)
        if values is None:
            continue
        frames = np.arange(1, len(values) + 1, dtype=np.float64)
        if place == 0:
            lines.append(Line(label, frames, values, 1))
        else:
            colour = _BASELINE_COLOURS[(place - 1) % len(_BASELINE_COLOURS)]
            lines.append(Line(label, frames, values, colour, "dashed"))
    if not lines:
        return None
    first = _frame_values(parts[0][1])
    said = f"Values of the model: {', '.join(map(number, first))}." if first else ""
    return LineChart(
        name, f"Loss by latent frame{suffix}", "latent frame", "nats per token", lines, said
    )


def _frames_table(parts: list[tuple[str, dict[str, Any]]], suffix: str) -> Table:
    columns = [(label, values) for label, f in parts if (values := _frame_values(f)) is not None]
    longest = max(len(values) for _, values in columns)
    rows = [
        [cell(frame + 1), *(cell(v[frame] if frame < len(v) else None) for _, v in columns)]
        for frame in range(longest)
    ]
    heads = ["latent frame", *(label for label, _ in columns)]
    return Table(f"Loss by latent frame{suffix}: numbers", heads, rows, is_open=False)


def _maps(parts: list[tuple[str, dict[str, Any]]], name: str, suffix: str) -> HeatMaps | None:
    found: list[tuple[str, NDArray[np.float64]]] = []
    for label, figures in parts:
        value = figures.get(_PLACES)
        grid = shapes.grid(value.get(NATS) if isinstance(value, dict) else value)
        if grid is not None and (not found or grid.shape == found[0][1].shape):
            found.append((label, grid))
    if not found:
        return None
    values = found[0][1]
    row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
    said = (
        f"Means over all frames. The {found[0][0]}'s loss is between "
        f"{number(float(np.nanmin(values)))} and {number(float(np.nanmax(values)))}, highest at "
        f"row {row + 1} of {values.shape[0]}, column {column + 1} of {values.shape[1]}."
    )
    return HeatMaps(name, f"Loss by place{suffix}", "nats per token", found, said)


def _map_table(caption: str, values: NDArray[np.float64]) -> Table:
    height, width = values.shape
    rows = [[cell(row + 1), *(cell(float(v)) for v in values[row])] for row in range(height)]
    heads = ["row", *map(str, range(1, width + 1))]
    return Table(f"Loss by place, {caption}: numbers", heads, rows, is_open=False)
