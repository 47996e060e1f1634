"""What the plots show: ratios and bands worked by hand, marks counted in the figures."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
from matplotlib.figure import Figure

from shared.report import svg
from shared.report.plots import claims_svg, measurement_svg, ratio, sensitivity_rows, sensitivity_svg
from shared.report.tableplot import draw
from tests.shared.test_report_document import make_claim, make_document


def drawn(rows: list[Mapping[str, Any]], **plot: Any) -> Figure:
    with svg.style():
        return draw({"kind": "bar", "x": "x", "y": "y"} | plot, rows)


@pytest.mark.parametrize(
    ("changes", "value", "band"),
    [
        ({"paper_value": 2.0, "value": 3.0, "tolerance": {"rel": 0.1}}, 1.5, (0.9, 1.1)),
        ({"paper_value": 4.0, "value": 3.0, "tolerance": {"abs": 1.0}}, 0.75, (0.75, 1.25)),
        ({"paper_value": 4.0, "value": 3.0, "tolerance": None}, 0.75, (1.0, 1.0)),
        ({"paper_value": 2.0, "value": 3.0, "tolerance": {"rel": 0.1}, "relation": "at_least"}, 1.5, (0.9, math.inf)),
        ({"paper_value": 2.0, "value": 3.0, "tolerance": {"rel": 0.1}, "relation": "at_most"}, 1.5, (0.0, 1.1)),
        # at least -4 is at most 1 in units of -4, with a quarter of slack
        ({"paper_value": -4.0, "value": -3.0, "tolerance": {"abs": 1.0}, "relation": "at_least"}, 0.75, (0.0, 1.25)),
        ({"paper_value": -4.0, "value": -6.0, "tolerance": {"abs": 1.0}, "relation": "at_most"}, 1.5, (0.75, math.inf)),
        ({"paper_value": [1.0, 3.0], "value": 2.5, "tolerance": {"rel": 0.1}, "relation": "between"}, 1.25, (0.4, 1.6)),
    ],
)
def test_ratio_and_band(changes: dict[str, Any], value: float, band: tuple[float, float]) -> None:
    made = ratio(make_claim("a", **changes))
    assert made is not None
    assert made.value == pytest.approx(value)
    assert made.band == pytest.approx(band)
    assert made.low is None


def test_an_interval_keeps_its_order_under_a_negative_number() -> None:
    made = ratio(make_claim("a", paper_value=-2.0, value=-3.0, ci_low=-4.0, ci_high=-1.0))
    assert made is not None
    assert (made.low, made.high) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("paper", "value"), [(None, 1.0), (1.0, None), (0.0, 1.0), (2.0, -1.0), (2.0, 0.0), ([1.0, -1.0], 1.0)]
)
def test_no_ratio_without_two_numbers_of_one_sign(paper: Any, value: Any) -> None:
    row = make_claim("a", paper_value=paper, value=value)
    assert ratio(row) is None
    assert claims_svg([row]) is None


def test_the_plot_of_claims_names_each_claim_in_the_colour_of_its_verdict() -> None:
    text = claims_svg(make_document()["claims"])
    assert text is not None
    for ident in ("energy_vs_naive", "flops_cut_pascal", "recounted_flops"):
        assert f">{ident}</text>" in text
    assert "gpu_energy" not in text
    assert "69.002 ms vs 69.033 ms" in text
    assert "var(--v-not-replicated, #b02330)" in text
    assert "var(--band, #c9d6ea)" in text
    assert "var(--v-error" not in text


def test_colours_follow_the_theme_and_text_follows_the_page() -> None:
    text = measurement_svg(make_document()["measurements"][0])
    assert text is not None
    styles = " ".join(re.findall(r'style="([^"]*)"', text))
    assert (
        set(re.findall(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", styles))) == set()
    )  # no colour outside a variable
    assert "DejaVu" not in text
    assert "system-ui" in text
    assert "<path" in text
    assert ">latency (ms)</text>" in text
    assert measurement_svg({"title": "t", "rows": [], "plot": None}) is None


def test_grouped_bars_stand_beside_each_other_with_their_errors() -> None:
    rows = [
        {"x": "a", "y": 1.0, "s": "one", "e": 0.5},
        {"x": "a", "y": 2.0, "s": "two", "e": 0.5},
        {"x": "b", "y": -3.0, "s": "one"},
    ]
    axes = drawn(rows, series="s", error="e", hline=0.5).axes[0]
    bars = [(round(bar.get_x() + bar.get_width() / 2, 3), bar.get_height()) for bar in axes.patches]
    assert bars == [(-0.195, 1.0), (0.805, -3.0), (0.195, 2.0)]  # half of 0.78 apart
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    segments = [path.vertices[:, 1].tolist() for item in axes.collections for path in item.get_paths()]
    assert segments == [[0.5, 1.5], [1.5, 2.5]]
    assert [
        line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1 and line.get_linestyle() == "--"
    ] == [0.5]


def test_stacked_bars_add_up() -> None:
    rows = [{"x": "a", "y": 1.0, "s": "one"}, {"x": "a", "y": 2.0, "s": "two"}, {"x": "b", "y": 4.0, "s": "two"}]
    figure = drawn(rows, kind="stacked", series="s")
    bars = [(bar.get_y(), bar.get_height()) for bar in figure.axes[0].patches]
    assert bars == [(0.0, 1.0), (1.0, 2.0), (0.0, 4.0)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]


def test_long_labels_lay_the_bars_down_and_log_bars_start_at_a_power_of_ten() -> None:
    rows = [{"x": f"a model with a long name {n}", "y": 30.0 * 10**n} for n in range(3)]
    axes = drawn(rows, log_y=True, ylabel="GMAC").axes[0]
    assert [bar.get_width() for bar in axes.patches] == [30.0, 300.0, 3000.0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] == 10.0
    assert axes.get_xlabel() == "GMAC"


def test_lines_have_log_axes_bands_and_ticks_at_their_few_places() -> None:
    rows = [{"x": 2**n, "y": 4.0**n, "lo": 4.0**n / 2, "hi": 4.0**n * 2} for n in range(4)]
    axes = drawn(rows, kind="line", log_x=True, log_y=True, error=["lo", "hi"]).axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 4, 8]
    assert axes.get_xticks().tolist() == [1, 2, 4, 8]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.5, 128.0)


def test_labels_of_a_log_axis_are_apart_and_say_their_number() -> None:
    rows = [{"x": x, "y": y} for x, y in ((50, 1e8), (375, 2e8), (500, 3e8), (5000, 5e8))]
    figure = drawn(rows, kind="line", log_x=True, log_y=True)
    with svg.style():
        figure.draw_without_rendering()
    axes = figure.axes[0]
    assert axes.get_xticks().tolist() == [50, 375, 5000]  # 500 would run into 375
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert {"1e8", "2e8", "5e8"} <= set(labels)
    assert len(labels) == len(set(labels))


def test_a_legend_of_long_names_keeps_inside_its_figure() -> None:
    names = [f"jetson_orin_nano_super_{n}" for n in range(7)]
    figure = drawn([{"x": n, "y": 1.0, "s": name} for n, name in enumerate(names)], kind="line", series="s")
    with svg.style():
        figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_a_missing_number_is_a_gap_and_not_a_zero() -> None:
    rows = [{"x": 1, "y": 1.0}, {"x": 2, "y": None}, {"x": 3, "y": 3.0}]
    ys = drawn(rows, kind="line").axes[0].lines[0].get_ydata()
    assert ys[0] == 1.0
    assert math.isnan(ys[1])
    assert len(drawn([{"x": "a", "y": None}, {"x": "b", "y": 2.0}]).axes[0].patches) == 1


def test_words_on_the_x_axis_of_a_line_keep_their_order() -> None:
    rows = [{"x": name, "y": 1.0} for name in ("small", "base", "large")]
    axes = drawn(rows, kind="scatter").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["small", "base", "large"]


@pytest.mark.parametrize(
    ("plot", "rows", "message"),
    [
        ({"kind": "pie"}, [{"x": 1, "y": 1}], "unknown kind of plot 'pie'"),
        ({"series": "s"}, [{"x": 1, "y": 1}], "no column 's'"),
        ({"error": ["lo", "hi"]}, [{"x": 1, "y": 1, "lo": 0}], "no column 'hi'"),
        ({}, [{"x": 1, "y": None}], "'y' has no number"),
        ({}, [], "no column 'x'"),
    ],
)
def test_a_plot_that_does_not_fit_its_table(plot: dict[str, Any], rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(svg.PlotError, match=message):
        drawn(rows, **plot)


def test_dollar_signs_are_not_mathematics() -> None:
    rows = [{"x": "$x^2$ & <b>", "y": 1.0}]
    text = measurement_svg(
        {"title": "a $ b", "rows": rows, "plot": {"kind": "bar", "x": "x", "y": "y", "ylabel": "$ per hour"}}
    )
    assert text is not None
    assert "$x^2$ &amp; &lt;b&gt;" in text
    assert "$ per hour" in text


def test_sensitivity_is_sorted_by_span_and_says_what_flips() -> None:
    row = make_document()["claims"][0]
    assert [item["figure"] for item in sensitivity_rows(row)] == ["compute.macs_per_cycle", "ddr.bandwidth", "clock"]
    text = sensitivity_svg(row)
    assert text is not None
    assert text.index("does not flip") < text.index("flips at ×0.980") < text.index("flips at ×1.06")
    assert sensitivity_svg(make_claim("a")) is None
