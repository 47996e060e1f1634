"""Draws the table of a measurement as its ``Plot`` says: bars, stacked bars, lines or points, with errors and log axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared.report import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_IN, _HEIGHT_IN = 5.8, 3.3
_LEGEND_KEY_IN, _LETTER_IN = 0.5, 0.072  # of the legend, whose columns are as wide as its longest name
_MARKERS_UP_TO = 40  # points of a line that get a marker
_LABEL_CHARACTERS = 48  # in all labels of a bar chart side by side; more, and the bars lie down

Rows = Sequence[Mapping[str, Any]]


def draw(plot: Mapping[str, Any], rows: Rows) -> Figure:
    """The figure of one table; call it inside :func:`shared.report.svg.style`.

    Raises :class:`shared.report.svg.PlotError` for an unknown kind, a column that no row has, and a table without a number to draw.
    """
    kinds = {"bar": _bars, "stacked": _bars, "line": _curves, "scatter": _curves}
    kind = plot.get("kind")
    if kind not in kinds:
        raise svg.PlotError(f"unknown kind of plot '{kind}'")
    error = plot.get("error")
    wanted = [plot.get("x"), plot.get("y"), plot.get("series"), *([error] if isinstance(error, str) else error or [])]
    for column in wanted:
        if column is not None and not any(column in row for row in rows):
            raise svg.PlotError(f"the table has no column '{column}'")
    if not any(_number(row.get(plot["y"])) is not None for row in rows):
        raise svg.PlotError(f"the column '{plot['y']}' has no number")
    return kinds[str(kind)](plot, rows)


def _bars(plot: Mapping[str, Any], rows: Rows) -> Figure:
    """Grouped or stacked bars; they lie down when the labels would not fit side by side."""
    labels = list(dict.fromkeys(str(row.get(plot["x"])) for row in rows))
    groups = _series(plot, rows)
    stacked = plot["kind"] == "stacked"
    lying = sum(map(len, labels)) + 2 * len(labels) > _LABEL_CHARACTERS
    slots = len(labels) * (1 if stacked else len(groups))
    canvas, axes = svg.figure(_WIDTH_IN, max(2.2, 1.1 + 0.3 * slots + 0.12 * len(labels)) if lying else _HEIGHT_IN)
    thickness = 0.68 if stacked else 0.78 / len(groups)
    bottoms = dict.fromkeys(labels, 0.0)
    for index, (name, members) in enumerate(groups.items()):
        values = {str(row.get(plot["x"])): row for row in members}
        for place, label in enumerate(labels):
            value = _number(values.get(label, {}).get(plot["y"]))
            if value is None:
                continue
            offset = 0.0 if stacked else (index - (len(groups) - 1) / 2) * thickness
            error = _error(plot, values[label], value)
            style: dict[str, Any] = {
                "color": _colour(index),
                "label": name if label == _first(labels, values, plot) else None,
            }
            if error is not None and not stacked:
                style["error_kw"] = {"ecolor": svg.INK, "elinewidth": 1.2, "capsize": 3}
                style["yerr" if not lying else "xerr"] = [[error[0]], [error[1]]]
            if lying:
                axes.barh(place + offset, value, thickness * 0.94, left=bottoms[label], **style)
            else:
                axes.bar(place + offset, value, thickness * 0.94, bottom=bottoms[label], **style)
            if stacked:
                bottoms[label] += value
    ticks = range(len(labels))
    if lying:
        axes.set_yticks(ticks, labels, color=svg.INK)
        axes.set_ylim(len(labels) - 0.5, -0.5)
    else:
        axes.set_xticks(ticks, labels, color=svg.INK)
    axes.tick_params(axis="y" if lying else "x", length=0)
    axes.grid(axis="y" if lying else "x", visible=False)
    _finish(axes, plot, rows, swapped=lying, legend=plot.get("series") is not None)
    return canvas


def _curves(plot: Mapping[str, Any], rows: Rows) -> Figure:
    """Lines or points, one colour per series; the interval of a line is a band, that of a point a bar."""
    canvas, axes = svg.figure(_WIDTH_IN, _HEIGHT_IN)
    numeric = all(_number(row.get(plot["x"])) is not None for row in rows)
    places = {label: place for place, label in enumerate(dict.fromkeys(str(row.get(plot["x"])) for row in rows))}
    for index, (name, members) in enumerate(_series(plot, rows).items()):
        xs = [float(row[plot["x"]]) if numeric else places[str(row.get(plot["x"]))] for row in members]
        ys = [value if (value := _number(row.get(plot["y"]))) is not None else math.nan for row in members]
        errors = [_error(plot, row, y) or (0.0, 0.0) for row, y in zip(members, ys, strict=True)]
        low, high = ([error[side] for error in errors] for side in (0, 1))
        colour = _colour(index)
        if plot["kind"] == "scatter":
            axes.plot(xs, ys, "o", color=colour, label=name, markersize=6, markeredgecolor=svg.PAPER)
            if plot.get("error"):
                axes.errorbar(xs, ys, yerr=[low, high], fmt="none", ecolor=colour, elinewidth=1.2, capsize=3, zorder=1)
        else:
            axes.plot(xs, ys, "o-" if len(xs) <= _MARKERS_UP_TO else "-", color=colour, label=name)
            if plot.get("error"):
                below = [y - part for y, part in zip(ys, low, strict=True)]
                above = [y + part for y, part in zip(ys, high, strict=True)]
                axes.fill_between(xs, below, above, color=colour, alpha=0.18, linewidth=0)
    if not numeric:
        axes.set_xticks(list(places.values()), list(places), color=svg.INK)
    xs_used = sorted({float(row[plot["x"]]) for row in rows}) if numeric else []
    _finish(axes, plot, rows, swapped=False, legend=plot.get("series") is not None, places=xs_used)
    return canvas


def _finish(
    axes: Axes, plot: Mapping[str, Any], rows: Rows, *, swapped: bool, legend: bool, places: Sequence[float] = ()
) -> None:
    """Log axes, labels, reference line and legend. ``swapped``: the values run along the x axis; ``places``: numeric x."""
    value_axis, place_axis = (axes.xaxis, axes.yaxis) if swapped else (axes.yaxis, axes.xaxis)
    if plot.get("log_y"):
        (axes.set_xscale if swapped else axes.set_yscale)("log")
        if plot["kind"] in ("bar", "stacked"):
            _log_floor(axes, swapped, [value for row in rows if (value := _number(row.get(plot["y"]))) and value > 0])
    if plot.get("log_x") and places:
        axes.set_xscale("log")
    if plot.get("hline") is not None:
        line = axes.axvline if swapped else axes.axhline
        line(plot["hline"], color=svg.MUTED, linewidth=1.2, linestyle="--")
    if plot.get("log_y"):
        svg.log_ticks(value_axis)
    if plot.get("log_x") and places:
        svg.log_ticks(place_axis, places)
    value_axis.set_label_text(str(plot.get("ylabel") or plot["y"]))
    place_axis.set_label_text(str(plot.get("xlabel") or (plot["x"] if places else "")))
    if legend:
        handles, names = axes.get_legend_handles_labels()
        columns = int(_WIDTH_IN / (_LEGEND_KEY_IN + _LETTER_IN * max((len(name) for name in names), default=0)))
        columns = max(1, min(len(names), columns, 4))
        axes.figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.2)


def _log_floor(axes: Axes, swapped: bool, values: Sequence[float]) -> None:
    """Start log bars at a power of ten: a bar has no zero there, and one that starts at the smallest value would vanish."""
    if values:
        low = 10.0 ** (math.ceil(math.log10(min(values))) - 1)
        (axes.set_xlim if swapped else axes.set_ylim)(low, None)


def _series(plot: Mapping[str, Any], rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the value of the series column, in order of appearance; one group where there is no such column."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get(plot["series"])) if plot.get("series") else "", []).append(row)
    return groups


def _first(labels: Sequence[str], values: Mapping[str, Mapping[str, Any]], plot: Mapping[str, Any]) -> str | None:
    """The first label at which a series has a number: the bar that names the series in the legend."""
    return next((label for label in labels if _number(values.get(label, {}).get(plot["y"])) is not None), None)


def _error(plot: Mapping[str, Any], row: Mapping[str, Any], value: float) -> tuple[float, float] | None:
    """Distances below and above ``value``: from a column of half widths, or from a pair of columns (low, high)."""
    columns = plot.get("error")
    if not columns or math.isnan(value):
        return None
    if isinstance(columns, str):
        half = _number(row.get(columns))
        return None if half is None else (abs(half), abs(half))
    low, high = (_number(row.get(column)) for column in columns)
    if low is None or high is None:
        return None
    return max(0.0, value - low), max(0.0, high - value)


def _colour(index: int) -> str:
    return svg.SERIES[index % len(svg.SERIES)]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
