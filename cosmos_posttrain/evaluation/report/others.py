"""Sections on every other evaluation: generation, the tokenizer, 1X, and what may come.

Flows in: ``Evaluation``s of any shape. Flows out: ``Section``s: scalars as tables, series of a
quantity as one chart, clips and failures as tables.
"""

from __future__ import annotations

import numpy as np

from cosmos_posttrain.evaluation.report import shapes
from cosmos_posttrain.evaluation.report.charts import NEUTRAL, NUM_COLOURS, Line, LineChart
from cosmos_posttrain.evaluation.report.curves import is_number
from cosmos_posttrain.evaluation.report.evaluations import Evaluation
from cosmos_posttrain.evaluation.report.section import Section
from cosmos_posttrain.evaluation.report.tables import (
    MAX_ROWS,
    Cell,
    Table,
    cell,
    mark_best,
    number,
    table_of_objects,
    words,
)

GENERATE = "generate"
_TITLES = {
    GENERATE: "Generated clips against the truth",
    "tokenizer": "The tokenizer alone",
    "tokenbench": "TokenBench",
    "onex": "1X World Model Challenge",
}
_LEADS = {
    GENERATE: "Between two floors, which know no model (the last given frame repeated, its motion "
    "carried on), and the ceiling, the tokenizer's own reconstruction. Frames left of the dotted "
    "line were given.",
}
_WIDTH = 8  # columns of scalars at most; the rest is a list
_ITSELF = "generated"
_CEILINGS = ("reconstruction",)
_MARKS = "num_input_frames"  # where the model's own frames begin


def other_section(command: str, evaluations: list[Evaluation]) -> Section:
    """All that the evaluations of one command tell."""
    charts, tables = list[LineChart](), list[Table]()
    for place, evaluation in enumerate(evaluations):
        suffix = f": {evaluation.name}" if len(evaluations) > 1 else ""
        tables += _scalar_tables(evaluation, suffix)
        charts += _series_charts(evaluation, f"{_anchor(command)}-{place}", suffix)
        if failed := table_of_objects(f"Failures{suffix}", evaluation.failures, is_open=True):
            tables.append(failed)
        if rows := table_of_objects(f"Every clip{suffix}", evaluation.rows):
            tables.append(rows)
    title = _TITLES.get(command, f"evaluate.py {command}")
    return Section(_anchor(command), title, _LEADS.get(command, ""), [*charts], tables)


def _anchor(command: str) -> str:
    letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in command.lower())
    return f"evaluation-{letters}"


def _scalar_tables(evaluation: Evaluation, suffix: str) -> list[Table]:
    """Quantities of several things as a table with a column each; all others as a list."""
    by_name: dict[str, dict[str, float]] = {}
    for path, value in shapes.scalars(evaluation.figures).items():
        of, quantity = shapes.split(path)
        by_name.setdefault(of, {})[quantity] = value
    alone = by_name.pop("", {})
    columns = [
        key
        for key in dict.fromkeys(k for values in by_name.values() for k in values)
        if shapes.is_known(key)
    ][:_WIDTH]
    rows = []
    for name, values in by_name.items():
        if any(key in columns for key in values):
            rows.append([Cell(words(name), name), *(cell(values.get(key)) for key in columns)])
        rest = {k: v for k, v in values.items() if k not in columns}
        alone |= {f"{name} {key}": value for key, value in rest.items()}
    for column, key in enumerate(columns, start=1):
        mark_best(rows, column, lowest=key in shapes.LOWER, but=_CEILINGS)
    tables = [Table(f"Scores{suffix}", ["", *map(words, columns)], rows)] if rows else []
    if alone:
        shown = list(alone.items())[:MAX_ROWS]
        listed = [[Cell(words(key), key), cell(value)] for key, value in shown]
        tables.append(Table(f"Figures{suffix}", ["figure", "value"], listed))
    return tables


def _series_charts(evaluation: Evaluation, name: str, suffix: str) -> list[LineChart]:
    """One chart a known quantity, with a line for each thing that it is known of."""
    found: dict[str, list[tuple[str, list[float]]]] = {}
    for path, values in shapes.series(evaluation.figures).items():
        of, quantity = shapes.split(path)
        if shapes.is_known(quantity):
            found.setdefault(quantity, []).append((of, values))
    given = evaluation.settings.get(_MARKS)
    marks = [given + 0.5] if is_number(given) else []
    charts = []
    for quantity, items in found.items():
        items.sort(key=lambda item: _ITSELF not in item[0])
        lines = []
        for place, (of, values) in enumerate(items[: NUM_COLOURS + 3]):
            frames = np.arange(1, len(values) + 1, dtype=np.float64)
            is_itself = place == 0 or _ITSELF in of
            style = "line" if is_itself else "dashed"
            lines.append(Line(words(of), frames, values, min(place + 1, NEUTRAL), style))
        heading = f"{words(quantity)} by frame{suffix}"
        said = f"The model's own frames begin after frame {given}. " if marks else ""
        said += " ".join(
            f"{words(of) or words(quantity)}: {number(values[0])} to {number(values[-1])}."
            for of, values in items
        )
        anchor = f"{name}-{quantity.replace('_', '-')}"
        charts.append(
            LineChart(anchor, heading, "frame", words(quantity), lines, said, marks=marks)
        )
    return charts
