"""Sensitivity against models whose flip is known in closed form."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.hardware import (
    Achieved,
    DeviceBatch,
    Uncertain,
    WorkloadArrays,
    cost_batch,
    latin_hypercube,
    load_device,
    one_at_a_time,
)

Array = npt.NDArray[np.float64]


def ratio(p: Mapping[str, Array]) -> Array:
    return p["a"] / p["b"]


FIGURES = {
    "a": Uncertain(8.0, 4.0, 16.0),
    "b": Uncertain(2.0, 1.9, 2.1),
    "unused": Uncertain(5.0, 1.0, 9.0),
}


def test_flip_factors_of_a_ratio_in_closed_form() -> None:
    rows = {row.figure: row for row in one_at_a_time(ratio, FIGURES, lambda v: v >= 3)}
    assert rows["a"].flip_factor == pytest.approx(3 * 2 / 8, rel=1e-8)  # a / 2 = 3
    assert rows["b"].flip_factor == pytest.approx(8 / 3 / 2, rel=1e-8)  # 8 / b = 3
    assert (rows["a"].low, rows["a"].high) == (2.0, 8.0)
    assert (rows["b"].low, rows["b"].high) == (pytest.approx(8 / 2.1), pytest.approx(8 / 1.9))
    assert rows["a"].flips_within_uncertainty
    assert not rows["b"].flips_within_uncertainty
    assert rows["unused"].flip_factor is None
    assert rows["unused"].verdict == "never within 100x"
    assert rows["a"].verdict == "flips at x0.75 (a = 6)"


def test_the_factor_lies_on_the_flipped_side_and_the_strongest_comes_first() -> None:
    def model(p: Mapping[str, Array]) -> Array:
        return p["b"] / p["a"] ** 2  # a enters squared: a smaller move of it is enough

    rows = one_at_a_time(model, FIGURES, lambda v: v < 0.1)
    assert [row.figure for row in rows] == ["a", "b", "unused"]
    for row in rows[:2]:
        assert row.flip_factor is not None
        moved = {
            name: np.array([f.value * (row.flip_factor if name == row.figure else 1)]) for name, f in FIGURES.items()
        }
        assert model(moved)[0] >= 0.1


@given(st.floats(0.02, 50))
def test_a_threshold_is_found_wherever_it_lies(threshold: float) -> None:
    if abs(np.log(threshold)) < 1e-6:
        return
    row = one_at_a_time(lambda p: p["x"], {"x": Uncertain(1.0, 1.0, 1.0)}, lambda v: v >= threshold)[0]
    assert row.flip_factor == pytest.approx(threshold, rel=1e-8)


def test_the_nearer_of_two_flips_is_reported() -> None:
    # holds between 0.5 and 8: down by 2 is nearer than up by 8
    row = one_at_a_time(lambda p: p["x"], {"x": Uncertain(1.0, 0.9, 1.1)}, lambda v: (v >= 0.5) & (v <= 8))[0]
    assert row.flip_factor == pytest.approx(0.5, rel=1e-8)
    assert not row.flips_within_uncertainty


def test_a_verdict_that_fails_can_flip_to_hold() -> None:
    row = one_at_a_time(lambda p: p["x"], {"x": Uncertain(1.0, 0.9, 1.1)}, lambda v: v > 90)[0]
    assert row.flip_factor == pytest.approx(90, rel=1e-8)
    assert one_at_a_time(lambda p: p["x"], {"x": Uncertain(1.0, 0.9, 1.1)}, lambda v: v > 101)[0].flip_factor is None


def test_a_fraction_never_exceeds_one() -> None:
    fraction = {"f": Uncertain(0.5, 0.4, 0.6, maximum=1.0)}
    seen: list[float] = []

    def model(p: Mapping[str, Array]) -> Array:
        seen.append(float(p["f"].max()))
        return p["f"]

    assert one_at_a_time(model, fraction, lambda v: v < 1.5)[0].flip_factor is None
    assert one_at_a_time(model, fraction, lambda v: v < 0.9)[0].flip_factor == pytest.approx(1.8, rel=1e-8)
    assert max(seen) == 1.0


def test_the_range_of_a_model_that_is_not_monotone() -> None:
    row = one_at_a_time(lambda p: (p["x"] - 1) ** 2, {"x": Uncertain(1.0, 0.5, 1.5)}, lambda v: v < 10)[0]
    assert (row.low, row.high) == (0.0, 0.25)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 0 < lo"):
        Uncertain(1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="value <= maximum"):
        Uncertain(2.0, 1.0, 3.0, maximum=1.0)
    with pytest.raises(ValueError, match="one value per sample"):
        one_at_a_time(lambda p: np.ones(2), FIGURES, lambda v: v > 0)


def test_latin_hypercube_of_a_known_distribution() -> None:
    # log-uniform over [1, e^2]: the logarithm is uniform over [0, 2]
    figures = {"x": Uncertain(2.0, 1.0, float(np.exp(2.0))), "fixed": Uncertain(3.0, 3.0, 3.0)}
    spread = latin_hypercube(lambda p: np.log(p["x"]) + 0 * p["fixed"], figures, lambda v: v < 1.5, n=2000)
    assert spread.median == pytest.approx(1.0, abs=2e-3)
    assert (spread.low, spread.high) == (pytest.approx(0.05, abs=2e-3), pytest.approx(1.95, abs=2e-3))
    assert spread.holds == pytest.approx(0.75, abs=1e-3)  # stratified: far better than 1/sqrt(n)
    again = latin_hypercube(lambda p: np.log(p["x"]) + 0 * p["fixed"], figures, lambda v: v < 1.5, n=2000)
    assert again == spread


def test_the_figures_of_a_device_through_the_cost_model() -> None:
    # Memory-bound at 3.5 ms, compute-bound once the bandwidth is up: 3.35e12 B over 3.35e12 B/s against 0.5 s of compute
    device = load_device("h100_sxm5_80gb")
    arrays = WorkloadArrays.from_rows(
        [{"name": "mm", "dtype": "bfloat16", "flops": 9.89e14 / 2, "bytes_read": 3.35e12}]
    )
    achieved = Achieved(1.0, 1.0, 0.0)
    paths = DeviceBatch.of([device], arrays, achieved=achieved).figures
    figures = {path: Uncertain.of(device.figure(path)) for path in paths}

    def latency(samples: Mapping[str, Array]) -> Array:
        return cost_batch(arrays, DeviceBatch.varied(device, arrays, samples, achieved=achieved)).latency_s

    rows = {row.figure: row for row in one_at_a_time(latency, figures, lambda t: t > 0.8)}
    assert rows["memory.dram.bandwidth"].flip_factor == pytest.approx(1 / 0.8, rel=1e-8)
    assert rows["peak.bf16"].flip_factor is None  # slower compute only makes it slower
    assert rows["memory.dram.bandwidth"].low == pytest.approx(1 / 1.01)
    rows = {row.figure: row for row in one_at_a_time(latency, figures, lambda t: t < 2)}
    assert rows["peak.bf16"].flip_factor == pytest.approx(0.25, rel=1e-8)


def test_energy_figures_may_be_swept_far_beyond_what_is_plausible() -> None:
    # 1 s of streaming at 1.555e12 B/s: 66.5 W + 183.5 W = 250 W, and the limit of 400 W holds whatever the figure
    device = load_device("a100_sxm4_40gb")
    arrays = WorkloadArrays.from_rows([{"name": "copy", "dtype": "float32", "bytes_read": 1.555e12}])
    figures = {path: Uncertain.of(device.figure(path)) for path in DeviceBatch.of([device], arrays, ideal=True).figures}
    assert set(figures) == {"memory.dram.bandwidth", "energy.board.floor", "energy.board.per_byte.dram", "power.limit"}

    def energy(samples: Mapping[str, Array]) -> Array:
        return cost_batch(arrays, DeviceBatch.varied(device, arrays, samples, ideal=True)).energy_j

    rows = {row.figure: row for row in one_at_a_time(energy, figures, lambda e: e < 300)}
    assert rows["energy.board.per_byte.dram"].flip_factor == pytest.approx(
        (300 - 66.5) / (1.18e-10 * 1.555e12), rel=1e-8
    )
    assert rows["energy.board.floor"].flip_factor == pytest.approx((300 - 1.18e-10 * 1.555e12) / 66.5, rel=1e-8)
    assert rows["power.limit"].flip_factor is None
    # the board's limit clips the dynamic part, so energy per byte alone can never take it beyond 400 J
    rows = {row.figure: row for row in one_at_a_time(energy, figures, lambda e: e < 401)}
    assert rows["energy.board.per_byte.dram"].flip_factor is None
    assert rows["energy.board.floor"].flip_factor == pytest.approx(401 / 66.5, rel=1e-8)
