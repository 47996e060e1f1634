"""Numbers, units and intervals for people."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.report import format as fmt
from tests.shared.test_report_document import make_claim, make_document


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (math.nan, "–"),
        (math.inf, "∞"),
        (0, "0"),
        (3, "3"),
        (22_050_432, "22,050,432"),
        (9.2344, "9.23"),
        (69.002, "69.0"),
        (637.478, "637"),
        (1234.5, "1,234"),
        (0.012345, "0.0123"),
        (-0.5, "−0.500"),
        (1.5e-7, "1.50e-07"),
        (1.234567e12, "1,234,567,000,000"),
        (1.2345678e12 + 0.5, "1.23e+12"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.069002, "s", "69.0 ms"),
        (30.8e-6, "s", "30.8 µs"),
        (2.5, "s", "2.50 s"),
        (4.840 * 2**20, "bytes", "4.84 MiB"),
        (2**30, "B", "1 GiB"),
        (0.690, "J", "690 mJ"),
        (19.2e9, "bytes/s", "19.2 GB/s"),
        (63.5e9, "FLOP", "63.5 GFLOP"),
        (9.234, "ratio", "9.23×"),
        (67.8, "%", "67.8 %"),
        (4.84, "MiB", "4.84 MiB"),
        (16, "count", "16"),
        (16, None, "16"),
        (0.0, "s", "0 s"),
    ],
)
def test_quantity(value: float, unit: str | None, text: str) -> None:
    assert fmt.quantity(value, unit) == text


@pytest.mark.parametrize(
    ("value", "low", "high", "text"),
    [
        (9.24, 9.20, 9.28, "9.24 [9.20, 9.28]"),
        (9.24, 9.24, 9.24, "9.24"),
        (9.24, -math.inf, math.inf, "9.24"),
        (9.24, None, None, "9.24"),
        (9.24, 6.2, 12.2, "9.2 [6.2, 12.2]"),
        (0.5, -0.1, 1.1, "0.50 [−0.10, 1.10]"),
        (1234.6, 1200.2, 1269.0, "1,235 [1,200, 1,269]"),
        (1.0, 0.9986, 1.0014, "1.0000 [0.9986, 1.0014]"),  # half a width of 0.0014: two digits of it
        (None, 1.0, 2.0, "–"),
    ],
)
def test_interval(value: float | None, low: float | None, high: float | None, text: str) -> None:
    assert fmt.interval(value, low, high) == text


def test_ours_takes_prefix_and_decimals_of_the_paper() -> None:
    row = make_claim("a", paper_value=0.069033, value=0.0690, unit="s")
    assert fmt.stated(row) == "69.033 ms"
    assert fmt.ours(row) == "69.000 ms"
    row = make_claim("b", paper_value=0.5, value=2.5e-4, unit="s")  # the same prefix, or the two could not be compared
    assert (fmt.stated(row), fmt.ours(row)) == ("500 ms", "0.250 ms")
    row = make_claim("c", paper_value=22_050_432, value=22_050_433.0, unit="")
    assert (fmt.stated(row), fmt.ours(row)) == ("22,050,432", "22,050,433")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"relation": "at_least", "paper_value": 2, "unit": "x"}, "≥ 2×"),
        ({"relation": "at_most", "paper_value": 0.1, "unit": "%"}, "≤ 0.1 %"),
        ({"relation": "between", "paper_value": [1.1, 2.1], "unit": "ratio"}, "1.1–2.1×"),
        ({"relation": "ordering", "paper_value": None}, "ordering"),
        ({"relation": "equals", "paper_value": None}, "–"),
        ({"kind": "finding", "paper_value": None, "stated_value": 72.0, "unit": "%"}, "72 %"),
        ({"paper_value": 568.445, "unit": "ms"}, "568.445 ms"),
    ],
)
def test_stated(changes: dict[str, Any], text: str) -> None:
    assert fmt.stated(make_claim("a", **changes)) == text


@given(
    st.floats(min_value=-1e8, max_value=1e8, allow_subnormal=False), st.sampled_from(["", "%", "ratio", "s", "bytes"])
)
def test_a_shown_number_is_within_its_last_digit(value: float, unit: str) -> None:
    """Read back what is shown: three significant digits are never further off than half a per cent."""
    text = fmt.quantity(value, unit).replace("−", "-").replace(",", "").rstrip("×")
    figure, _, suffix = text.partition(" ")
    divisors = {"m": 1e-3, "µ": 1e-6, "n": 1e-9, "p": 1e-12, "Ki": 2**10, "Mi": 2**20}
    shown = float(figure) * divisors.get(suffix[:-1], 1.0)
    assert shown == pytest.approx(value, rel=5.1e-3, abs=1e-300)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0.0, "0.0 s"),
        (0.0123, "12.3 ms"),
        (0.4, "0.4 s"),
        (59.96, "1 min 00 s"),
        (301.7, "5 min 02 s"),
        (3900, "1 h 05 min"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert fmt.duration(seconds) == text


def test_dates_are_utc_and_other_text_is_left() -> None:
    assert fmt.date("2026-03-01T16:05:00+02:00") == "2026-03-01 14:05 UTC"
    assert fmt.date(0) == "1970-01-01 00:00 UTC"
    assert fmt.date("this morning") == "this morning"


def test_counts_keep_the_order_of_verdicts_and_split_by_kind() -> None:
    document = make_document()
    assert fmt.counts(document) == {
        "replicated": 4,
        "direction only": 2,
        "not replicated": 1,
        "not tested": 1,
        "error": 1,
    }
    assert list(fmt.counts(document)) == list(fmt.VERDICTS)
    assert fmt.counts(document, "finding") == {"replicated": 1}


def test_control_and_tolerance_in_words() -> None:
    claims = {row["id"]: row for row in make_document()["claims"]}
    assert fmt.control_text(claims["energy_vs_naive"]) == (
        "with hardware.reorder=false (experts are fetched per token) the claim fails, as it must, at 1×"
    )
    assert fmt.control_text(claims["multi_gate_beats_single"]).endswith("the claim still holds, at 1.30 points")
    untried = make_claim("a", control={"set": {"x": 1}, "means": None, "value": None, "verdict": None, "ok": None})
    assert fmt.control_text(untried) == "x=1 was not run"
    assert fmt.control_text(make_claim("a")) == ""
    assert fmt.tolerance(make_claim("a", tolerance={"rel": 0.005, "reason": "rounding"})) == "±0.5 % (rounding)"
    assert fmt.tolerance(make_claim("a", tolerance={"abs": 0.001, "reason": ""}, unit="MiB")) == "±0.001 MiB"
