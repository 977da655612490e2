"""The page itself: one HTML file that needs nothing else.

Flows in: a ``Page``. Flows out: HTML in which all text from files is escaped, and whose policy lets
a browser run its own script only and fetch nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources

from cosmos_posttrain.evaluation.report.clips import Selection
from cosmos_posttrain.evaluation.report.section import Section
from cosmos_posttrain.evaluation.report.tables import number, words
from cosmos_posttrain.evaluation.report.verdict import Finding

_FOLDER = "page"


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        title: its heading.
        made: the day and time.
        findings: what the measurements say.
        overview: what was run, in short.
        samples: the clips.
        sections: all others, in order.
        version: of the package.
    """

    title: str
    made: str
    findings: list[Finding]
    overview: Section
    samples: Selection
    sections: list[Section]
    version: str


def render(page: Page) -> str:
    """The HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__ or "", _FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": number, "words": words}
    script = _text("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template("report.html.j2")
    return template.render(
        page=page, style=_text("report.css"), script=script, script_hash=f"sha256-{digest}"
    )


def _text(name: str) -> str:
    """A file of the page; it ends where its element ends, for the hash."""
    assert __package__
    return resources.files(__package__).joinpath(_FOLDER, name).read_text(encoding="utf-8").strip()
