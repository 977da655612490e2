"""Tables as the page shows them: text that a person reads, and the value that it is sorted by.

Flows in: values of any kind, from files. Flows out: ``Table``s, of bounded length.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from cosmos_posttrain.evaluation.report.curves import is_number

MAX_ROWS = 200
_MAX_TEXT = 160
_UPPER = {"psnr", "ssim", "lpips", "fvd", "rfvd", "lr", "id", "fps", "mfu"}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown.
        value: what it is sorted by; None sorts last.
        mark: "best", "changed" or "bad": a class of the page.
    """

    text: str
    value: float | str | None = None
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A table that can be sorted by each of its columns.

    Attributes:
        caption: above it.
        columns: headings; the first column names its row.
        rows: one cell a column.
        note: below it.
        is_open: shown at once; else behind its caption.
        can_sort: by its columns; not where the order of the rows means something.
    """

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""
    is_open: bool = True
    can_sort: bool = True

    def is_numeric(self, column: int) -> bool:
        """Whether all that stands in a column are numbers, which are set flush right."""
        cells = [row[column] for row in self.rows if row[column].value is not None]
        return bool(cells) and all(is_number(cell.value) for cell in cells)


def cell(value: Any, mark: str = "") -> Cell:
    """A cell of any value."""
    if value is None or value == "":
        return Cell("\N{EM DASH}", None, mark)
    if is_number(value):
        return Cell(number(value), value, mark)
    return Cell(shortened(text_of(value)), text_of(value)[:_MAX_TEXT], mark)


def number(value: float) -> str:
    """1,234 or 0.1234: four digits that count."""
    if not math.isfinite(value):
        return "\N{EM DASH}"
    if isinstance(value, int) or value == 0:
        return f"{int(value):,}".replace("-", "\N{MINUS SIGN}")
    if abs(value) < 1e-3:
        return f"{value:.3g}".replace("-", "\N{MINUS SIGN}")
    digits = max(3 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def text_of(value: Any) -> str:
    """Any value as words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if is_number(value):
        return number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(text_of(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {text_of(item)}" for key, item in value.items())
    return "\N{EM DASH}" if value is None else str(value)


def shortened(text: str, length: int = _MAX_TEXT) -> str:
    """The text, its middle left out where it is long."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}\N{HORIZONTAL ELLIPSIS}{text[-half:]}"


def words(key: str) -> str:
    """``top1_accuracy`` as ``top1 accuracy``; abbreviations in capitals."""
    parts = key.replace(".", " ").replace("_", " ").split()
    return " ".join(part.upper() if part.lower() in _UPPER else part for part in parts)


def table_of_objects(
    caption: str, objects: Sequence[dict[str, Any]], is_open: bool = False
) -> Table | None:
    """One row an object: its scalars, by the keys of all of them; None where there is nothing."""
    shown = objects[:MAX_ROWS]
    keys = list(dict.fromkeys(k for item in shown for k, v in item.items() if _is_scalar(v)))[:12]
    if not keys:
        return None
    keys.sort(key=lambda key: key not in ("name", "clip", "video"))
    rows = [
        [cell(item.get(k) if _is_scalar(item.get(k)) else None) for k in keys] for item in shown
    ]
    note = f"The first {MAX_ROWS:,} of {len(objects):,}." if len(objects) > MAX_ROWS else ""
    return Table(caption, [words(key) for key in keys], rows, note, is_open)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, bool)) or is_number(value)


def mark_best(rows: list[list[Cell]], column: int, lowest: bool, but: Collection[str] = ()) -> None:
    """Marks the best number of a column, in place; rows whose first cell is in ``but`` are none."""
    values = [
        (value, place)
        for place, row in enumerate(rows)
        if is_number(value := row[column].value) and row[0].value not in but
    ]
    if len({value for value, _ in values}) < 2:
        return
    best = (min if lowest else max)(value for value, _ in values)
    for value, place in values:
        if value == best:
            rows[place][column] = Cell(rows[place][column].text, value, "best")
