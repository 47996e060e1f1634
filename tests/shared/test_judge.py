"""Verdict rules, case by case. A wrong rule fails at least one of these."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.claims import Claim
from shared.experiment import Measurement, NotTested, mean_interval
from shared.judge import Failure, Situation, Verdict, judge, model_interval
from tests.shared.test_claims import claim_data

HERE = Situation("reduced", "zcu104")


def make(**changes: Any) -> Claim:
    return Claim.model_validate(claim_data(**changes))


def verdict(claim: Claim, value: float, low: float | None = None, high: float | None = None, **more: Any) -> Verdict:
    situation = more.pop("situation", HERE)
    return judge(claim, Measurement("speedup", value, low, high, **more), situation).verdict


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2.0, Verdict.REPLICATED),
        (2.1, Verdict.REPLICATED),  # exactly on the 5 % edge, which binary floats cannot hold
        (2.11, Verdict.DIRECTION),
        (1.89, Verdict.DIRECTION),
        (1.0, Verdict.NOT_REPLICATED),  # no effect
        (0.5, Verdict.NOT_REPLICATED),  # opposite sign
    ],
)
def test_equals_on_an_exact_number(value: float, expected: Verdict) -> None:
    assert verdict(make(), value) == expected


def test_without_a_neutral_value_a_miss_has_no_direction() -> None:
    assert verdict(make(neutral=None), 2.11) == Verdict.NOT_REPLICATED


def test_a_reduction_is_claimed_downwards() -> None:
    claim = make(value=0.5)  # half the time, so smaller than 1 is the claimed side
    assert verdict(claim, 0.8) == Verdict.DIRECTION
    assert verdict(claim, 1.2) == Verdict.NOT_REPLICATED


def test_bounds() -> None:
    at_least, at_most = make(relation="at_least"), make(relation="at_most", value=0.5)
    assert verdict(at_least, 2.4) == Verdict.REPLICATED
    assert verdict(at_least, 1.8) == Verdict.DIRECTION
    assert verdict(at_most, 0.3) == Verdict.REPLICATED
    assert verdict(at_most, 0.6) == Verdict.DIRECTION
    between = make(relation="between", value=[2.0, 3.0])
    assert verdict(between, 1.9) == Verdict.REPLICATED  # 5 % of the lower bound
    assert verdict(between, 3.16) == Verdict.DIRECTION


def test_an_interval_that_includes_no_effect_is_never_a_replication() -> None:
    trained = make(evidence="trained")
    assert verdict(trained, 2.0, 1.8, 2.2, n_seeds=3) == Verdict.REPLICATED
    assert verdict(trained, 2.0, 0.9, 3.1, n_seeds=3) == Verdict.NOT_REPLICATED
    assert verdict(trained, 1.5, 1.2, 1.8, n_seeds=3) == Verdict.DIRECTION
    assert verdict(trained, 1.5, 0.9, 2.1, n_seeds=3) == Verdict.NOT_REPLICATED


def test_ordering_needs_the_whole_interval_above_no_effect() -> None:
    claim = make(relation="ordering", value=None, neutral=0.0, evidence="trained", tolerance=None)
    assert verdict(claim, 1.0, 0.1, 1.9, n_seeds=3) == Verdict.REPLICATED
    assert verdict(claim, 1.0, -0.1, 2.1, n_seeds=3) == Verdict.NOT_REPLICATED
    assert verdict(claim, -1.0, -1.9, -0.1, n_seeds=3) == Verdict.NOT_REPLICATED
    not_comparable = make(
        relation="ordering", value=None, neutral=0.0, evidence="trained", tolerance=None, size_comparable_at=["full"]
    )
    assert verdict(not_comparable, 1.0, 0.1, 1.9, n_seeds=3) == Verdict.DIRECTION


def test_trained_needs_seeds_and_more_than_smoke() -> None:
    trained = make(evidence="trained")
    assert verdict(trained, 2.0, 1.9, 2.1, n_seeds=2) == Verdict.NOT_TESTED
    assert verdict(trained, 2.0, 1.9, 2.1, n_seeds=3, situation=Situation("smoke", "zcu104")) == Verdict.NOT_TESTED
    assert verdict(make(), 2.0, situation=Situation("smoke", "zcu104")) == Verdict.REPLICATED  # counting needs no scale


def test_size_not_comparable_at_this_scale_is_at_most_a_direction() -> None:
    claim = make(size_comparable_at=["full"])
    assert verdict(claim, 2.0) == Verdict.DIRECTION
    assert verdict(claim, 2.0, situation=Situation("full", "zcu104")) == Verdict.REPLICATED


def test_modelled_tolerance_against_the_models_own_error() -> None:
    claim = make(evidence="modelled")  # tolerance 5 %
    assert verdict(claim, 2.0, model_error_rel=0.04) == Verdict.REPLICATED
    assert verdict(claim, 2.0, model_error_rel=0.06) == Verdict.DIRECTION
    assert verdict(claim, 2.0) == Verdict.DIRECTION  # an unpublished error is no small error


def test_another_device_than_the_papers_is_at_most_a_direction() -> None:
    claim = make(evidence="modelled", conditions={"device": "h200"})
    assert verdict(claim, 2.0, model_error_rel=0.01) == Verdict.DIRECTION
    assert verdict(claim, 2.0, model_error_rel=0.01, situation=Situation("reduced", "h200")) == Verdict.REPLICATED


def test_what_was_fitted_is_not_tested() -> None:
    judgement = judge(make(used_in_fit="sets the clock"), Measurement("speedup", 2.0), HERE)
    assert judgement.verdict == Verdict.NOT_TESTED
    assert judgement.reason == "used in the fit: sets the clock"


def test_not_tested_and_failure_carry_their_reason() -> None:
    assert judge(make(), NotTested("speedup", "needs a GPU"), HERE).reason == "needs a GPU"
    failed = judge(make(), Failure("ValueError: boom"), HERE)
    assert (failed.verdict, failed.reason) == (Verdict.ERROR, "ValueError: boom")


def test_an_impossible_number_is_an_error() -> None:
    assert verdict(make(), math.nan) == Verdict.ERROR
    assert verdict(make(), math.inf) == Verdict.ERROR
    assert verdict(make(), 2.0, 2.1, 2.2) == Verdict.ERROR  # outside its own interval


def test_far_better_than_the_paper_is_suspicious() -> None:
    flagged = judge(make(relation="at_least"), Measurement("speedup", 2.6), HERE)
    assert flagged.verdict == Verdict.REPLICATED
    assert flagged.suspicious
    assert "mistake" in flagged.reason
    assert not judge(make(relation="at_least"), Measurement("speedup", 2.4), HERE).suspicious
    assert not judge(make(kind="finding"), Measurement("speedup", 9.0), HERE).suspicious
    assert not judge(make(size_comparable_at=["full"]), Measurement("speedup", 9.0), HERE).suspicious  # another thing


@given(value=st.floats(-1e6, 1e6), target=st.floats(-1e6, 1e6), neutral=st.floats(-1e6, 1e6), rel=st.floats(0, 0.5))
def test_a_replication_is_always_within_tolerance(value: float, target: float, neutral: float, rel: float) -> None:
    claim = make(value=target, neutral=neutral, tolerance={"rel": rel, "reason": "for the property"})
    result = verdict(claim, value)
    if result == Verdict.REPLICATED:
        assert abs(value - target) <= rel * abs(target) * (1 + 1e-6) + 2e-9 * abs(target)
    if result == Verdict.DIRECTION:
        assert value != neutral
        assert (value > neutral) == (target > neutral)


@given(st.floats(-100, 100), st.floats(0.01, 10))
def test_mirroring_a_claim_mirrors_nothing_in_the_verdict(value: float, half: float) -> None:
    """Stating the same effect downwards instead of upwards gives the same verdict."""
    up = make(value=2.0, neutral=0.0, evidence="trained")
    down = make(value=-2.0, neutral=0.0, evidence="trained")
    assert verdict(up, value, value - half, value + half, n_seeds=3) == verdict(
        down, -value, -value - half, -value + half, n_seeds=3
    )


def test_mean_interval_by_hand() -> None:
    # Values 1, 2, 3: sd 1, standard error 1/sqrt(3), t(0.975, 2) = 4.30265.
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert low == pytest.approx(2.0 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert high == pytest.approx(2.0 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert mean_interval([5.0])[1:] == (-math.inf, math.inf)


def test_a_modelled_number_carries_its_models_error() -> None:
    claim = make(evidence="modelled", tolerance={"rel": 0.45, "reason": "wide enough for the test"})
    assert model_interval(Measurement("speedup", 2.0, model_error_rel=0.1)) == (1.8, 2.2)
    assert model_interval(Measurement("speedup", -2.0, model_error_rel=0.1)) == (-2.2, -1.8)
    assert verdict(claim, 1.5, model_error_rel=0.1) == Verdict.REPLICATED  # within 45 % of 2, and clear of 1
    inside = judge(claim, Measurement("speedup", 1.12, model_error_rel=0.2), HERE)  # [0.9, 1.34] includes 1
    assert inside.verdict == Verdict.DIRECTION
    assert "the tolerance" not in inside.reason


@pytest.mark.parametrize("relation", ["equals", "ordering"])
def test_a_model_without_a_published_error_never_replicates(relation: str) -> None:
    stated = {} if relation == "equals" else {"value": None, "tolerance": None}
    claim = make(evidence="modelled", relation=relation, **stated)
    assert verdict(claim, 2.0, model_error_rel=0.01) == Verdict.REPLICATED
    assert verdict(claim, 2.0) == Verdict.DIRECTION


def test_an_ordering_inside_the_models_error_is_a_direction() -> None:
    claim = make(evidence="modelled", relation="ordering", value=None, tolerance=None)
    assert verdict(claim, 1.3, model_error_rel=0.2) == Verdict.REPLICATED  # [1.04, 1.56]
    assert verdict(claim, 1.2, model_error_rel=0.2) == Verdict.DIRECTION  # [0.96, 1.44]
    assert verdict(claim, 0.9, model_error_rel=0.2) == Verdict.NOT_REPLICATED  # the model itself says the opposite


@given(st.floats(1.0001, 3.0), st.floats(0.0, 0.9), st.floats(0.0, 0.9))
def test_a_larger_error_of_the_model_never_improves_a_verdict(value: float, error: float, more: float) -> None:
    claim = make(evidence="modelled", tolerance={"rel": 0.4, "reason": "for the property"})
    order = [Verdict.NOT_REPLICATED, Verdict.DIRECTION, Verdict.REPLICATED]
    worse = verdict(claim, value, model_error_rel=error + more)
    assert order.index(worse) <= order.index(verdict(claim, value, model_error_rel=error))
