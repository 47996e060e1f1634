"""Numbers, units, intervals, sources and verdicts in words and digits for people.

Everything inside the suite is SI and unrounded; this module is the only place where a figure is rounded or a unit scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from shared.verdict import Verdict

MISSING = "–"
VERDICTS = tuple(str(verdict) for verdict in Verdict)
GLYPHS = {"replicated": "✓", "direction only": "↗", "not replicated": "✗", "not tested": "○", "error": "!"}
RELATIONS = {"at_least": "≥ ", "at_most": "≤ "}

_SI = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"), (1e-12, "p"))
_BINARY = ((2.0**40, "Ti"), (2.0**30, "Gi"), (2.0**20, "Mi"), (2.0**10, "Ki"), (1.0, ""))
# units of identifiers and claims that are scaled by a prefix: label, and the prefixes in use for it
_SCALED = {
    "s": ("s", tuple(p for p in _SI if p[0] <= 1)),
    "J": ("J", _SI),
    "W": ("W", _SI),
    "Hz": ("Hz", _SI),
    "FLOP": ("FLOP", tuple(p for p in _SI if p[0] >= 1)),
    "FLOPs": ("FLOP", tuple(p for p in _SI if p[0] >= 1)),
    "MAC": ("MAC", tuple(p for p in _SI if p[0] >= 1)),
    "MACs": ("MAC", tuple(p for p in _SI if p[0] >= 1)),
    "FLOP/s": ("FLOP/s", tuple(p for p in _SI if p[0] >= 1)),
    "bytes/s": ("B/s", tuple(p for p in _SI if p[0] >= 1)),
    "B/s": ("B/s", tuple(p for p in _SI if p[0] >= 1)),
    "bytes": ("B", _BINARY),
    "byte": ("B", _BINARY),
    "B": ("B", _BINARY),
}
_TIMES = {"ratio", "x", "X", "×", "times"}
_NO_UNIT = {"", "1", "count", "number", "-"}


@dataclass(frozen=True)
class Unit:
    """A unit for people: the figure is divided by ``divisor`` and followed by ``suffix``."""

    divisor: float
    suffix: str

    def text(self, value: float, decimals: int | None = None) -> str:
        """The figure with its unit, such as ``69.0 ms``."""
        return number(value / self.divisor, decimals) + self.suffix


def unit_for(unit: str | None, reference: float | None = None) -> Unit:
    """The unit to show. Bare SI units get the prefix that suits ``reference``; any other unit is shown as it is written."""
    name = (unit or "").strip()
    if name in _TIMES:
        return Unit(1.0, "×")
    if name in _NO_UNIT:
        return Unit(1.0, "")
    if name == "percent":
        return Unit(1.0, " %")
    if name not in _SCALED:
        return Unit(1.0, f" {name}")
    label, prefixes = _SCALED[name]
    if not reference or not math.isfinite(reference):
        return Unit(1.0, f" {label}")
    divisor, prefix = next((p for p in prefixes if abs(reference) >= p[0]), prefixes[-1])
    return Unit(divisor, f" {prefix}{label}")


def number(value: float | None, decimals: int | None = None) -> str:
    """``value`` with ``decimals``, or else three significant digits; whole numbers are never cut; ``–`` for None and NaN."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if decimals is not None:
        return _signed(f"{value:,.{decimals}f}")
    if value == int(value) and size < 1e15:
        return _signed(f"{value:,.0f}")
    if size >= 1e9 or size < 1e-4:
        return _signed(f"{value:.2e}")
    return _signed(f"{value:,.{_decimals(size, 3)}f}")


def as_stated(value: float) -> str:
    """A published figure as it was printed: up to seven significant digits, nothing added (``69.033``, ``22,050,432``)."""
    if value == int(value) and abs(value) < 1e15:
        return _signed(f"{value:,.0f}")
    return _signed(f"{value:,.{_stated_decimals(value)}f}") if 1e-6 <= abs(value) < 1e15 else _signed(f"{value:.6g}")


def quantity(value: float | None, unit: str | None, *, like: float | None = None) -> str:
    """A figure with its unit. ``like``: a published figure whose prefix and number of decimals ours must show at least."""
    return interval(value, None, None, unit, like=like)


def interval(
    value: float | None, low: float | None, high: float | None, unit: str | None = None, *, like: float | None = None
) -> str:
    """``9.24× [9.20, 9.28]``: rounded to what the interval's width supports; without an interval as :func:`quantity`."""
    if value is None or not math.isfinite(value):
        return number(value)
    shown = unit_for(unit, like if like else value)
    scaled = value / shown.divisor
    bounds = [end / shown.divisor if end is not None and math.isfinite(end) else None for end in (low, high)]
    low, high = bounds
    if (low is None and high is None) or low == high:
        return shown.text(value, _decimals_like(scaled, None if like is None else like / shown.divisor))
    half = (
        (high - low) / 2
        if low is not None and high is not None
        else abs(scaled - (low if low is not None else high or 0.0))
    )
    decimals = max(_decimals(abs(half), 1), _decimals(abs(scaled), 2))
    return f"{shown.text(value, decimals)} [{number(low, decimals)}, {number(high, decimals)}]"


def stated(row: Mapping[str, Any]) -> str:
    """The paper's number of a claim (of a finding: the number that it states), with its relation: ``≥ 2×``, ``1.1–2.1×``."""
    value = stated_value(row)
    if value is None:
        return "ordering" if row.get("relation") == "ordering" else MISSING
    if isinstance(value, list | tuple):
        low, high = value
        unit = unit_for(row.get("unit"), high)
        return f"{as_stated(low / unit.divisor)}–{as_stated(high / unit.divisor)}{unit.suffix}"
    unit = unit_for(row.get("unit"), value)
    return f"{RELATIONS.get(row.get('relation') or '', '')}{as_stated(value / unit.divisor)}{unit.suffix}"


def stated_value(row: Mapping[str, Any]) -> Any:
    """``paper_value``, or for a finding without one its ``stated_value``: a number, a pair or None."""
    value = row.get("paper_value")
    return row.get("stated_value") if value is None else value


def ours(row: Mapping[str, Any]) -> str:
    """Our number with its interval, in the same unit as the paper's."""
    value = stated_value(row)
    like = max(value, key=abs) if isinstance(value, list | tuple) else value
    return interval(row.get("value"), row.get("ci_low"), row.get("ci_high"), row.get("unit"), like=like)


def tolerance(row: Mapping[str, Any]) -> str:
    """``±5 % (reason)`` or ``±0.001 MiB (reason)``; empty where there is none."""
    allowed = row.get("tolerance") or {}
    reason = f" ({allowed['reason']})" if allowed.get("reason") else ""
    if allowed.get("rel") is not None:
        return f"±{as_stated(allowed['rel'] * 100)} %{reason}"
    if allowed.get("abs") is not None:
        return f"±{as_stated(allowed['abs'])}{unit_for(row.get('unit')).suffix}{reason}"
    return reason.strip(" ()")


def is_recalled(row: Mapping[str, Any]) -> bool:
    """Whether the paper's figure was recalled and not read in the paper."""
    return "recalled" in str(row.get("tag") or "").lower()


def control_text(row: Mapping[str, Any]) -> str:
    """The negative control in a few words: the switch that turns the idea off, and what the claim did then. Empty without one."""
    control = row.get("control") or {}
    if not control:
        return ""
    switch = control.get("set")
    if isinstance(switch, Mapping):
        switch = ", ".join(f"{key}={value}" for key, value in switch.items())
    elif isinstance(switch, list | tuple):
        switch = ", ".join(str(part) for part in switch)
    meaning = f" ({control['means']})" if control.get("means") else ""
    value = control.get("value")
    passed = control.get("ok")
    if passed is None:
        return f"{switch}{meaning} was not run"
    value = control.get("value")
    number_then = f", at {quantity(value, row.get('unit'))}" if value is not None else ""
    return f"with {switch}{meaning} the claim {'fails, as it must' if passed else 'still holds'}{number_then}"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``3 min 12 s``, ``1 h 05 min``."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if 0 < seconds < 0.1:
        return quantity(seconds, "s")
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def date(started: str | float | None) -> str:
    """``2026-03-01 14:05 UTC`` from seconds since the epoch or an ISO date; other text is returned as it is."""
    if started is None:
        return MISSING
    if isinstance(started, str):
        try:
            moment = datetime.fromisoformat(started)
        except ValueError:
            return started
    else:
        moment = datetime.fromtimestamp(started, UTC)
    if moment.tzinfo is None:
        return moment.strftime("%Y-%m-%d %H:%M")
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def counts(document: Mapping[str, Any], kind: str | None = None) -> dict[str, int]:
    """How many rows have each verdict, in the fixed order of verdicts, verdicts without a row left out."""
    found = [
        row.get("verdict") for row in document.get("claims", []) if kind is None or row.get("kind", "claim") == kind
    ]
    return {verdict: found.count(verdict) for verdict in VERDICTS if verdict in found}


def machine(document: Mapping[str, Any]) -> str:
    """The host in a few words: processor, cores, GPU."""
    environment = document.get("environment") or {}
    cores, gpu = environment.get("num_cores"), environment.get("gpu")
    parts = [
        environment.get("cpu"),
        f"{cores} core{'' if cores == 1 else 's'}" if cores else None,
        ", ".join(gpu) if isinstance(gpu, list) else gpu,
    ]
    return ", ".join(str(part) for part in parts if part) or "unknown machine"


def commit(document: Mapping[str, Any]) -> str:
    """The commit of the code, as Markdown, and whether the code had local changes."""
    environment = document.get("environment") or {}
    return f"`{str(environment.get('commit') or 'unknown')[:10]}`{' with local changes' if environment.get('dirty') else ''}"


def _decimals(size: float, digits: int) -> int:
    """Decimals that show ``digits`` significant digits of ``size`` (one more where the first digit is 1), between 0 and 9."""
    if size == 0 or not math.isfinite(size):
        return 0
    exponent = math.floor(math.log10(size))
    leading_one = digits == 1 and size / 10.0**exponent < 2
    return min(9, max(0, digits - 1 - exponent + leading_one))


def _stated_decimals(value: float) -> int:
    """Decimals of a figure as printed, at most seven significant digits."""
    text = f"{abs(value):.{_decimals(abs(value), 7)}f}".rstrip("0")
    return len(text.partition(".")[2])


def _decimals_like(value: float, like: float | None) -> int | None:
    """At least the decimals of the published figure; None (three significant digits) where there is none."""
    if like is None or value == int(value) == like:
        return None
    if not 1e-4 <= abs(value) < 1e9:
        return None
    return max(_stated_decimals(like), _decimals(abs(value), 3))


def _signed(text: str) -> str:
    return "−" + text[1:] if text.startswith("-") else text
