"""Verdicts, computed in one place for all papers. Nobody writes one by hand.

``replicated``      our number is within the tolerance of the paper's;
``direction only``  the effect has the claimed sign and its confidence interval excludes "no effect", but the size is not the
                    paper's, or cannot be compared at this scale, on this device, or with this model's error;
``not replicated``  neither; ``not tested`` and ``error`` carry their reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.claims import Claim
from shared.experiment import Measurement, NotTested
from shared.verdict import Verdict

MIN_SEEDS = 3
SUSPICIOUS_RATIO = 1.5  # an effect this many times the paper's is flagged, not celebrated
_SLACK = 1e-9  # relative, for decimal fractions that binary floats cannot hold


@dataclass(frozen=True)
class Failure:
    """An experiment broke before it could settle a claim."""

    reason: str


@dataclass(frozen=True)
class Situation:
    """Under what circumstances a number was obtained."""

    scale: str
    device: str


@dataclass(frozen=True)
class Judgement:
    verdict: Verdict
    reason: str = ""
    suspicious: bool = False


def judge(claim: Claim, outcome: Measurement | NotTested | Failure, situation: Situation) -> Judgement:
    """The verdict on one claim.

    Args:
        claim: what the paper states.
        outcome: our number, or why there is none.
        situation: scale and device of the run.
    """
    if isinstance(outcome, Failure):
        return Judgement(Verdict.ERROR, outcome.reason)
    for reason in (
        claim.used_in_fit and f"used in the fit: {claim.used_in_fit}",
        claim.not_testable,
        isinstance(outcome, NotTested) and outcome.reason,
    ):
        if reason:
            return Judgement(Verdict.NOT_TESTED, str(reason))
    assert isinstance(outcome, Measurement)
    low = outcome.value if outcome.ci_low is None else outcome.ci_low
    high = outcome.value if outcome.ci_high is None else outcome.ci_high
    if not math.isfinite(outcome.value) or math.isnan(low) or math.isnan(high):
        return Judgement(Verdict.ERROR, f"the experiment gave {outcome.value}, which is not a number")
    if not low <= outcome.value <= high:
        return Judgement(
            Verdict.ERROR, f"the value {outcome.value:g} lies outside its own interval [{low:g}, {high:g}]"
        )
    if claim.evidence in ("trained", "measured") and situation.scale == "smoke":
        return Judgement(Verdict.NOT_TESTED, "smoke scale only shows that the code runs; use scale=reduced or full")
    if claim.evidence == "trained" and outcome.n_seeds < MIN_SEEDS:
        return Judgement(
            Verdict.NOT_TESTED, f"a trained claim needs {MIN_SEEDS} seeds or more, this run has {outcome.n_seeds}"
        )

    if claim.evidence == "modelled":
        low, high = model_interval(outcome)
    judgement = _compare(claim, outcome, low, high, situation)
    if not _incomparable(claim, situation) and _is_suspicious(claim, outcome.value):
        warning = "the effect is far larger than the paper's: look for a mistake before believing it"
        return Judgement(judgement.verdict, "; ".join(part for part in (judgement.reason, warning) if part), True)
    return judgement


def model_interval(number: Measurement) -> tuple[float, float]:
    """The interval of a modelled number: its own, if it has one, and the held-out error of the device model to both sides of it."""
    low = number.value if number.ci_low is None else number.ci_low
    high = number.value if number.ci_high is None else number.ci_high
    error = abs(number.value) * (number.model_error_rel or 0.0)
    return min(low, number.value - error), max(high, number.value + error)


def _compare(claim: Claim, outcome: Measurement, low: float, high: float, situation: Situation) -> Judgement:
    value = outcome.value
    side = _claimed_side(claim)
    if claim.evidence == "modelled" and outcome.ci_low is None:  # inside its error the sign still is the model's
        effect_shows = _beyond(claim, value, value, side)
    else:
        effect_shows = _beyond(claim, low, high, side)
    if claim.relation == "ordering":
        agrees, miss = effect_shows, _no_effect(claim, value, low, high, side)
    else:
        agrees, miss = _within(claim, value), f"{value:g} is not {_allowed(claim)}"
        if agrees and side and not effect_shows and outcome.ci_low is not None:
            agrees, miss = False, _no_effect(claim, value, low, high, side)
    if not agrees:
        if side and effect_shows and claim.relation != "ordering":
            return Judgement(Verdict.DIRECTION, f"the sign is the paper's, the size is not: {miss}")
        return Judgement(Verdict.NOT_REPLICATED, miss)
    cap = _cap(claim, outcome, low, high, situation)
    return Judgement(Verdict.DIRECTION, cap) if cap else Judgement(Verdict.REPLICATED)


def _cap(claim: Claim, outcome: Measurement, low: float, high: float, situation: Situation) -> str:
    """Why the size of an agreeing number proves less than it seems, or an empty string."""
    if reason := _incomparable(claim, situation):
        return reason
    if claim.evidence == "modelled":
        error = outcome.model_error_rel
        if error is None:
            return "the device model has published no error against silicon"
        side = _claimed_side(claim)
        if side and _beyond(claim, outcome.value, outcome.value, side) and not _beyond(claim, low, high, side):
            return f"the effect lies within the device model's own error ({error:.2g}): [{low:.4g}, {high:.4g}] includes {claim.neutral:g}"
        if claim.relation == "ordering":
            return ""
        tolerance = claim.tolerance.relative(_nearest_target(claim, outcome.value)) if claim.tolerance else 0.0
        if tolerance < error:
            return f"the tolerance ({tolerance:.2g}) is smaller than the model's own error ({error:.2g})"
    return ""


def _incomparable(claim: Claim, situation: Situation) -> str:
    """Why our size and the paper's are of different things, or an empty string."""
    if situation.scale not in claim.size_comparable_at:
        return f"the size cannot be compared with the paper's at scale={situation.scale}"
    device = claim.conditions.get("device")
    if claim.evidence in ("modelled", "measured") and device and device != situation.device:
        return f"the paper's size is for {device}, this one for {situation.device}"
    return ""


def _within(claim: Claim, value: float) -> bool:
    assert claim.tolerance is not None
    if isinstance(claim.value, tuple):
        low, high = claim.value
        return low - _margin(claim, low) <= value <= high + _margin(claim, high)
    assert claim.value is not None
    margin = _margin(claim, claim.value)
    if claim.relation == "at_least":
        return value >= claim.value - margin
    if claim.relation == "at_most":
        return value <= claim.value + margin
    return abs(value - claim.value) <= margin


def _margin(claim: Claim, target: float) -> float:
    assert claim.tolerance is not None
    return claim.tolerance.absolute(target) + _SLACK * abs(target)


def _allowed(claim: Claim) -> str:
    assert claim.tolerance is not None
    if isinstance(claim.value, tuple):
        return f"between {claim.value[0]:g} and {claim.value[1]:g}"
    words = {"equals": "", "at_least": "at least ", "at_most": "at most "}[claim.relation]
    assert claim.value is not None
    return f"{words}{claim.value:g} ± {claim.tolerance.absolute(claim.value):.3g}"


def _nearest_target(claim: Claim, value: float) -> float:
    if isinstance(claim.value, tuple):
        return min(claim.value, key=lambda bound: abs(bound - value))
    return claim.value if claim.value is not None else value


def _claimed_side(claim: Claim) -> int:
    """+1 or -1: on which side of "no effect" the claim lies; 0 where that has no meaning. An ordering is always stated upwards."""
    if claim.neutral is None:
        return 0
    if claim.relation == "ordering":
        return 1
    if isinstance(claim.value, tuple):
        sides = {_sign(bound - claim.neutral) for bound in claim.value}
        return sides.pop() if len(sides) == 1 else 0
    assert claim.value is not None
    return _sign(claim.value - claim.neutral)


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _beyond(claim: Claim, low: float, high: float, side: int) -> bool:
    """Whether the whole interval lies on the claimed side of "no effect"."""
    if not side or claim.neutral is None:
        return False
    return low > claim.neutral if side > 0 else high < claim.neutral


def _no_effect(claim: Claim, value: float, low: float, high: float, side: int) -> str:
    assert claim.neutral is not None
    if _sign(value - claim.neutral) == -side and not low <= claim.neutral <= high:
        return (
            f"the effect is significant with the opposite sign: {value:g} [{low:g}, {high:g}] against {claim.neutral:g}"
        )
    if low == high:
        return f"no effect: {value:g} against {claim.neutral:g}"
    return f"no significant effect: the interval [{low:g}, {high:g}] includes {claim.neutral:g}"


def _is_suspicious(claim: Claim, value: float) -> bool:
    """Whether the effect exceeds the paper's by more than SUSPICIOUS_RATIO. Bounds in the other direction cannot be exceeded."""
    side = _claimed_side(claim)
    if not side or claim.neutral is None or claim.value is None or claim.kind == "finding":
        return False
    best = claim.value if isinstance(claim.value, float) else max(claim.value, key=lambda bound: side * bound)
    return (value - claim.neutral) / (best - claim.neutral) > SUSPICIOUS_RATIO
