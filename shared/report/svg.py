"""Matplotlib figures as inline SVG that follows the page: its fonts, and its colours in the light and the dark theme.

Every colour is drawn as a key colour and then replaced by a CSS variable with the light colour as fallback, so a plot also stands
alone. Figures are made without pyplot: no display, no global state, safe in threads.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shared.report import format as fmt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# name of the CSS variable -> colour in the light theme; all different, since the colour is what is replaced
INK, MUTED, GRID, PAPER, BAND = "#1f2430", "#5d6675", "#dfe3ea", "#fffffe", "#c9d6ea"
VERDICT_COLOURS = {
    "replicated": "#13683f",
    "direction only": "#875800",
    "not replicated": "#b02330",
    "not tested": "#5c6472",
    "error": "#7d35a0",
}
SERIES = ("#2f6fbd", "#d9732a", "#2a9d77", "#b04a9c", "#8a6d1f", "#4b4fc4", "#cc4b5c", "#3a98b8")
_VARIABLES = (
    {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "surface", BAND: "band"}
    | {colour: f"v-{verdict.replace(' ', '-')}" for verdict, colour in VERDICT_COLOURS.items()}
    | {colour: f"s{index}" for index, colour in enumerate(SERIES, start=1)}
)
_FEW_PLACES = 9  # data points of an axis that all get a tick
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_RC: Any = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, searchable
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.facecolor": "none",
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
}


class PlotError(ValueError):
    """A table cannot be drawn as its plot says; the message is for the caption."""


@contextmanager
def style() -> Iterator[None]:
    """Everything drawn inside has the report's style; matplotlib's texts take theirs when they are made."""
    from matplotlib import rc_context

    with rc_context(_RC):
        yield


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of ``width`` by ``height`` inches; call it inside :func:`style`."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained")
    return canvas, canvas.add_subplot()


def to_svg(canvas: Figure, label: str) -> str:
    """The figure as an ``<svg>`` element with ``label`` for screen readers; its ids are unique to its content."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**_RC, "svg.hashsalt": "report"}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _inline(buffer.getvalue(), label)


def log_ticks(axis: Axis, places: Sequence[float] = ()) -> None:
    """Plain numbers on a log axis, its limits set: at ``places`` where these are few, else at 1-2-5 steps or powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_view_interval())
    wide = not 0 < low < high or high / low > 1000
    if 0 < len(places) <= _FEW_PLACES:
        axis.set_major_locator(FixedLocator(_apart(places, low, high)))
    else:
        steps = (1.0,) if wide or high / low > 50 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(subs=steps, numticks=8 if wide else 12))
    if not wide or places:
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axis.set_minor_formatter(NullFormatter())


def _apart(places: Sequence[float], low: float, high: float) -> list[float]:
    """Those of ``places`` whose labels do not run into that of the one before."""
    kept: list[float] = []
    for place in sorted(places):
        if place > 0 and (not kept or math.log(place / kept[-1]) > 0.09 * math.log(high / low)):
            kept.append(place)
    return kept


def _tick(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return fmt.number(float(f"{value:.6g}"))


def _inline(svg: str, label: str) -> str:
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    prefix = "p" + hashlib.sha256((label + svg).encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}-\1"', svg)
    svg = re.sub(r'style="[^"]*"', lambda match: _themed(match[0]), svg)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    tag = (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'style="width:{float(width) * 4 / 3:.0f}px" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink">'
    )
    return tag + re.sub(r"\n\s*", "\n", svg[svg.index(">") + 1 :]).strip()


def _themed(style: str) -> str:
    """Colours of one style attribute as CSS variables, and the page's font for matplotlib's."""
    for colour, name in _VARIABLES.items():
        style = style.replace(colour, f"var(--{name}, {colour})")
    # "font-family: ..." or, from older versions, "font: 10px ..."
    return re.sub(r"(font-family:|font: [^;\"]*?px) [^;\"]*", rf"\1 {_FONT}", style)
