"""Invariants of the cost model, for all workloads and achieved fractions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.hardware import Achieved, DeviceBatch, WorkloadArrays, cost, cost_batch, load_device
from tests.shared.test_hardware_roofline import MACHINE

positive = st.floats(1e6, 1e12)
rows_strategy = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.just("op"),
            "dtype": st.just("float32"),
            "flops": positive,
            "vector_ops": positive,
            "bytes_read": positive,
            "bytes_written": positive,
            "count": st.integers(1, 100),
        }
    ),
    min_size=1,
    max_size=5,
)
achieved_strategy = st.builds(Achieved, st.floats(0.05, 1), st.floats(0.05, 1), st.floats(0, 1e-4))


@given(rows_strategy, achieved_strategy, st.floats(1, 50))
def test_more_bandwidth_or_rate_is_never_slower_and_never_costs_more(
    rows: list[dict[str, float]], achieved: Achieved, factor: float
) -> None:
    device, arrays = load_device(dict(MACHINE, power={})), WorkloadArrays.from_rows(rows)
    for path in ("memory.dram.bandwidth", "peak.fp32"):
        value = device.figure(path).value
        batch = DeviceBatch.varied(device, arrays, {path: value * np.array([1, factor])}, achieved=achieved)
        result = cost_batch(arrays, batch)
        assert result.latency_s[1] <= result.latency_s[0] * (1 + 1e-12)
        assert result.energy_j[1] <= result.energy_j[0] * (1 + 1e-12)


@given(
    rows_strategy,
    achieved_strategy,
    st.sampled_from(["flops", "vector_ops", "bytes_read", "bytes_written"]),
    st.floats(1, 50),
)
def test_more_work_is_never_cheaper(
    rows: list[dict[str, float]], achieved: Achieved, field: str, factor: float
) -> None:
    device = load_device(dict(MACHINE, power={}))
    more = [row | {field: row[field] * factor} if i == 0 else row for i, row in enumerate(rows)]
    less_cost, more_cost = (cost(WorkloadArrays.from_rows(r), device, achieved=achieved) for r in (rows, more))
    assert more_cost.latency_s >= less_cost.latency_s * (1 - 1e-12)
    assert more_cost.energy_j >= less_cost.energy_j * (1 - 1e-12)


@given(rows_strategy, achieved_strategy)
def test_count_is_repetition(rows: list[dict[str, float]], achieved: Achieved) -> None:
    device = load_device(dict(MACHINE, power={}))
    unrolled = [row | {"count": 1} for row in rows for _ in range(min(int(row["count"]), 4))]
    counted = [row | {"count": min(int(row["count"]), 4)} for row in rows]
    a, b = (cost(WorkloadArrays.from_rows(r), device, achieved=achieved) for r in (unrolled, counted))
    assert a.latency_s == pytest.approx(b.latency_s)
    assert a.energy_j == pytest.approx(b.energy_j)


@given(rows_strategy, achieved_strategy)
def test_mean_power_lies_between_floor_and_limit(rows: list[dict[str, float]], achieved: Achieved) -> None:
    result = cost(WorkloadArrays.from_rows(rows), load_device(MACHINE), achieved=achieved)
    assert 20 * (1 - 1e-9) <= result.power_w <= 100 * (1 + 1e-9)
