"""A section of the page: what its template can show."""

from __future__ import annotations

from dataclasses import dataclass, field

from cosmos_posttrain.evaluation.report.charts import Chart
from cosmos_posttrain.evaluation.report.tables import Table


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        anchor: its address on the page, letters and hyphens.
        title: its heading.
        lead: a sentence or two below it.
        charts: pictures.
        tables: below them.
        listings: (caption, text) of texts that are shown as they are.
        command: what to run to fill a section that has nothing yet.
    """

    anchor: str
    title: str
    lead: str = ""
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    listings: list[tuple[str, str]] = field(default_factory=list)
    command: str = ""
