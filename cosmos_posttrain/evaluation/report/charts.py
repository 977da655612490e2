"""Pictures of numbers, drawn by matplotlib: SVG that takes its colours from the page, or PNG.

Flows in: a ``LineChart`` or a ``HeatMaps``. Flows out: an ``<svg>`` element in which every colour
is one of the page's (``var(--...)``), so that it fits light, dark and paper; the same as PNG pixels
for W&B. The page itself writes titles and legends around a picture.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

# Colours that are drawn and what the page puts in their place; the values on the right are those of
# page/report.css in light, for PNG.
_INK, _GRID = "#0a0b01", "#0a0b02"
_SERIES = tuple(f"#0a0c{number:02x}" for number in range(1, 8))
_PAGE = {_INK: ("--ink-2", "#59636e"), _GRID: ("--rule", "#dfe3e8")} | {
    colour: (f"--series-{number}", light)
    for number, (colour, light) in enumerate(
        zip(
            _SERIES,
            ("#1f5fbf", "#b4540a", "#1a7f4b", "#8a3ea8", "#b3263a", "#0b7285", "#6b7280"),
            strict=True,
        ),
        start=1,
    )
}
NUM_COLOURS = len(_SERIES)
NEUTRAL = NUM_COLOURS  # number of the grey one, for baselines
_WIDTH, _HEIGHT = 5.6, 2.9  # inches
_FONT = 9.5
_LOG_RATIO = 30.0  # a logarithmic axis from this ratio of largest to smallest on


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        label: for the legend, which the page writes.
        x: (N,) places.
        y: (N,) values.
        colour: 1 to ``NUM_COLOURS``.
        style: ``line``, ``faint`` (behind others), ``dots``, or ``dashed``.
    """

    label: str
    x: Sequence[float] | NDArray[np.float64]
    y: Sequence[float] | NDArray[np.float64]
    colour: int
    style: str = "line"


@dataclass(frozen=True)
class LineChart:
    """Lines over one axis.

    Attributes:
        name: unique on the page, letters and hyphens.
        title: what is shown; the page writes it.
        x_label: of the axis.
        y_label: of the axis.
        lines: what is drawn, later above earlier.
        description: the same in words, for those who do not see it.
        may_be_log: a logarithmic axis where values differ by far.
        whole_x: ticks at whole numbers only.
        marks: places of vertical lines.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    description: str
    may_be_log: bool = False
    whole_x: bool = True
    marks: list[float] = field(default_factory=list)

    @property
    def legend(self) -> list[tuple[str, int, str]]:
        """Label, colour and style of each line that has a label, once."""
        return list(dict.fromkeys((x.label, x.colour, x.style) for x in self.lines if x.label))

    def svg(self) -> Markup:
        """The picture for the page."""
        return _to_svg(self._draw(_page_colour), self.name, self.title, self.description)

    def png(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8, on white, with a legend."""
        figure = self._draw(_light_colour)
        axis = figure.axes[0]
        axis.set_title(self.title, fontsize=_FONT, parse_math=False)
        handles = [x for x in axis.lines if not x.get_label().startswith("_")]
        if handles:
            legend = axis.legend(handles=handles, fontsize=_FONT - 2)
            for text in legend.get_texts():
                text.set_parse_math(False)
        return _to_png(figure)

    def _draw(self, colour_of: Any) -> Any:
        figure = _figure(_WIDTH, _HEIGHT)
        axis = figure.add_subplot()
        styles: dict[str, dict[str, Any]] = {
            "line": {"linewidth": 1.8},
            "faint": {"linewidth": 0.8, "alpha": 0.35},
            "dots": {"linewidth": 0.9, "marker": "o", "markersize": 3.6, "alpha": 0.95},
            "dashed": {"linewidth": 1.5, "linestyle": (0, (4, 2.5))},
        }
        for line in self.lines:
            style = dict(styles[line.style])
            if line.style == "line" and len(line.x) <= 24:
                style |= {"marker": "o", "markersize": 3.2}
            colour = colour_of(_SERIES[line.colour - 1])
            (drawn,) = axis.plot(line.x, line.y, color=colour, label="_", **style)
            if line.label:
                drawn.set_label(line.label.lstrip("_"))
        for place in self.marks:
            axis.axvline(place, color=colour_of(_INK), linewidth=0.9, linestyle=(0, (1.5, 2)))
        _dress(axis, colour_of, self.x_label, self.y_label)
        if self.whole_x:
            axis.xaxis.get_major_locator().set_params(integer=True)
        if self.may_be_log and _spans_decades(self.lines):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: short(value))
            axis.yaxis.set_minor_formatter(lambda value, _: "")
        return figure


@dataclass(frozen=True)
class HeatMaps:
    """Grids of numbers side by side, in one scale of colours.

    Attributes:
        name: unique on the page, letters and hyphens.
        title: what is shown; the page writes it.
        unit: of the numbers.
        maps: heading, which is the page's own word, and (H, W) values.
        description: the same in words.
    """

    name: str
    title: str
    unit: str
    maps: list[tuple[str, NDArray[np.float64]]]
    description: str

    def svg(self) -> Markup:
        """The picture for the page."""
        return _to_svg(self._draw(_page_colour), self.name, self.title, self.description)

    def png(self) -> NDArray[np.uint8]:
        """(H, W, 3) uint8, on white."""
        return _to_png(self._draw(_light_colour))

    def _draw(self, colour_of: Any) -> Any:
        height, width = self.maps[0][1].shape
        columns = min(len(self.maps), 3)
        rows = -(-len(self.maps) // columns)
        cell = 2 * _WIDTH / max(columns, 2.4)
        figure = _figure(cell * columns + 0.8, rows * (cell * height / width + 0.45))
        low = min(float(np.nanmin(values)) for _, values in self.maps)
        high = max(float(np.nanmax(values)) for _, values in self.maps)
        axes = figure.subplots(rows, columns, squeeze=False)
        ink = colour_of(_INK)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (heading, values) in zip(axes.flat, self.maps, strict=False):
            shown = axis.imshow(values, cmap="viridis", vmin=low, vmax=max(high, low + 1e-9))
            axis.set_title(heading, fontsize=_FONT, color=ink, parse_math=False)
        bar = figure.colorbar(shown, ax=axes, fraction=0.025, pad=0.015)
        bar.set_label(self.unit, fontsize=_FONT, color=ink)
        bar.ax.tick_params(labelsize=_FONT - 1, colors=ink, length=2)
        bar.outline.set_visible(False)
        return figure


Chart = LineChart | HeatMaps


def _spans_decades(lines: Sequence[Line]) -> bool:
    values = np.concatenate([np.asarray(line.y, np.float64) for line in lines])
    return len(values) > 0 and values.min() > 0 and values.max() > _LOG_RATIO * values.min()


def _page_colour(colour: str) -> str:
    return colour


def _light_colour(colour: str) -> str:
    return _PAGE[colour][1]


def _figure(width: float, height: float) -> Any:
    """A figure that no window and no other figure knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def _dress(axis: Any, colour_of: Any, x_label: str, y_label: str) -> None:
    ink, grid = colour_of(_INK), colour_of(_GRID)
    axis.patch.set_alpha(0)
    axis.set_xlabel(x_label, fontsize=_FONT, color=ink)
    axis.set_ylabel(y_label, fontsize=_FONT, color=ink)
    axis.tick_params(which="both", labelsize=_FONT, length=0, colors=ink)
    axis.grid(True, axis="y", color=grid, linewidth=0.9)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(grid)
    axis.margins(x=0.015)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter(lambda value, _: short(value))


def short(value: float) -> str:
    """A number for a tick: 1,200, 0.25, 2.5e-4."""
    if value == 0 or 1e-4 <= abs(value) < 1000:
        return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.2g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@contextmanager
def _svg_settings(salt: str) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        yield


def _to_svg(figure: Any, name: str, title: str, description: str) -> Markup:
    """The ``<svg>`` element: the page's colours and font, ids that no other picture has."""
    from markupsafe import escape

    target = io.StringIO()
    with _svg_settings(name):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;?\s*", "", text)
    text = re.sub(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" @>', text, count=1)
    for colour, (variable, _) in _PAGE.items():
        text = text.replace(colour, f"var({variable})")
    labels = (
        f'class="chart" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(description)}'
        "</desc>"
    )
    return Markup(re.sub(r"\n\s*", "\n", text.replace("@>", labels, 1)).strip())


def _to_png(figure: Any) -> NDArray[np.uint8]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(150)
    figure.patch.set(alpha=1, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
