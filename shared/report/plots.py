"""The report's plots as SVG: claims against the paper, a measurement's table, the sensitivity of a claim."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.report import format as fmt
from shared.report import svg
from shared.report.tableplot import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH_IN = 11.0
_ROW_IN = 0.36
_NEAR_ONE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Ratio:
    """Ours over the paper's, with the interval and the band in which the claim counts as replicated."""

    row: Mapping[str, Any]
    value: float
    low: float | None
    high: float | None
    band: tuple[float, float]


def ratio(row: Mapping[str, Any]) -> Ratio | None:
    """The ratio of a row; None where one of the two is no number or their ratio is not positive (it has no place on a log axis)."""
    value, paper = row.get("value"), fmt.stated_value(row)
    if value is None or paper is None:
        return None
    first, last = paper if isinstance(paper, list | tuple) else (paper, paper)
    reference = (first + last) / 2
    if reference == 0 or not math.isfinite(value) or value / reference <= 0:
        return None
    allowed = row.get("tolerance") or {}
    slack = allowed["abs"] / abs(reference) if allowed.get("abs") is not None else allowed.get("rel") or 0.0
    low, high = sorted((first / reference, last / reference))
    band = [low - slack, high + slack]
    relation = row.get("relation")
    if relation in ("at_least", "at_most"):  # beyond the paper's number is within the claim
        band[(relation == "at_least") == (reference > 0)] = (
            math.inf if (relation == "at_least") == (reference > 0) else 0.0
        )
    ends = [
        end / reference for end in (row.get("ci_low"), row.get("ci_high")) if end is not None and math.isfinite(end)
    ]
    both = len(ends) == 2
    return Ratio(
        row, value / reference, min(ends) if both else None, max(ends) if both else None, (max(band[0], 0.0), band[1])
    )


def claims_svg(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Ours over the paper's number on a log axis, with intervals and tolerance bands; None where no row has both numbers."""
    drawn = [item for row in rows if (item := ratio(row)) is not None]
    if not drawn:
        return None
    with svg.style():
        canvas, axes = svg.figure(_WIDTH_IN, 0.8 + _ROW_IN * len(drawn))
        left, right = _ratio_limits(drawn)
        axes.set_xscale("log")
        axes.set_xlim(left, right)
        axes.set_ylim(len(drawn) - 0.5, -0.5)
        axes.axvline(1, color=svg.MUTED, linewidth=1, zorder=1)
        for y, item in enumerate(drawn):
            low, high = max(item.band[0], left), min(item.band[1], right)
            colour = svg.VERDICT_COLOURS.get(str(item.row.get("verdict")), svg.MUTED)
            axes.barh(y, high - low, left=low, height=0.62, color=svg.BAND, zorder=0.9)
            if item.low is not None and item.high is not None:
                axes.plot([max(item.low, left), min(item.high, right)], [y, y], color=colour, linewidth=2, zorder=2)
            axes.plot(item.value, y, "o", color=colour, markersize=8, markeredgecolor=svg.PAPER, zorder=3)
            axes.annotate(
                f"{fmt.ours(item.row).partition(' [')[0]} vs {fmt.stated(item.row)}",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=svg.MUTED,
                fontsize=9,
            )
        axes.set_yticks(range(len(drawn)), [str(item.row["id"]) for item in drawn], color=svg.INK)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        _ratio_ticks(axes, left, right)
        axes.set_xlabel("ours ÷ paper (log scale; band: within tolerance of the paper)")
        return svg.to_svg(canvas, "Our numbers divided by the paper's, with intervals and tolerance bands")


def sensitivity_svg(row: Mapping[str, Any]) -> str | None:
    """Tornado plot: how far the claim's number moves over the range of each device figure, the widest first."""
    items = sensitivity_rows(row)
    if not items:
        return None
    with svg.style():
        canvas, axes = svg.figure(_WIDTH_IN, 0.8 + _ROW_IN * len(items))
        centre = row.get("value") or 0.0
        for y, item in enumerate(items):
            for end, colour in ((item["value_low"], svg.SERIES[0]), (item["value_high"], svg.SERIES[1])):
                axes.barh(y, end - centre, left=centre, height=0.6, color=colour)
            flip = item.get("flip_factor")
            axes.annotate(
                f"flips at ×{fmt.number(flip)}" if flip is not None else "does not flip",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=svg.INK if flip is not None else svg.MUTED,
                fontsize=9,
            )
        axes.axvline(centre, color=svg.INK, linewidth=1)
        if isinstance(fmt.stated_value(row), int | float):
            axes.axvline(fmt.stated_value(row), color=svg.MUTED, linewidth=1, linestyle="--")
        axes.set_yticks(range(len(items)), [str(item["figure"]) for item in items], color=svg.INK)
        axes.set_ylim(len(items) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.08)
        unit = fmt.unit_for(row.get("unit")).suffix.strip()
        axes.set_xlabel(
            f"{row['id']}{f' ({unit})' if unit else ''}; blue: figure at its low end, orange: at its high end"
        )
        return svg.to_svg(canvas, f"Sensitivity of {row['id']}")


def sensitivity_rows(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The sensitivity entries that have both numbers, the widest span first."""
    items = [
        item
        for item in row.get("sensitivity") or []
        if _finite(item.get("value_low")) and _finite(item.get("value_high"))
    ]
    return sorted(items, key=lambda item: -abs(item["value_high"] - item["value_low"]))


def measurement_svg(measurement: Mapping[str, Any]) -> str | None:
    """The plot of a measurement's table, or None where it has none.

    Raises :class:`shared.report.svg.PlotError` where the plot does not fit the table. Drawn once per content, since several sinks show it.
    """
    if not measurement.get("plot"):
        return None
    content = {key: measurement.get(key) for key in ("title", "plot", "rows")}
    return _measurement_svg(json.dumps(content, sort_keys=True, default=str))


@functools.lru_cache(maxsize=256)
def _measurement_svg(content: str) -> str:
    measurement = json.loads(content)
    with svg.style():
        return svg.to_svg(draw(measurement["plot"], measurement["rows"]), str(measurement.get("title") or "plot"))


def _ratio_limits(items: Sequence[Ratio]) -> tuple[float, float]:
    values = [0.8, 1.25]
    for item in items:
        ends = (item.value, item.low, item.high, *item.band)
        values += [end for end in ends if end is not None and math.isfinite(end) and end > item.value / 100]
    return min(values) / 1.12, max(values) * 1.12


def _ratio_ticks(axes: Axes, left: float, right: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    if right / left < 4:
        axes.xaxis.set_major_locator(FixedLocator([tick for tick in _NEAR_ONE if left <= tick <= right]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        svg.log_ticks(axes.xaxis)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
