"""Every bound holds for a right cost and trips on a unit slip of 1000."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shared.errors import UserError
from shared.hardware import (
    Achieved,
    CapacityError,
    DeviceBatch,
    PhysicsError,
    WorkloadArrays,
    checks,
    cost_batch,
    load_device,
)
from shared.hardware.roofline import BatchCost, check_cost

SLIP = 1000.0

ARRAYS = WorkloadArrays.from_rows(
    [
        {"name": "mm", "dtype": "float32", "flops": 1e11, "bytes_read": 1e8, "bytes_written": 1e8, "count": 4},
        {"name": "gelu", "dtype": "float32", "vector_ops": 1e9, "bytes_read": 1e8, "bytes_written": 1e8, "count": 4},
    ]
)
DEVICE = load_device("a100_sxm4_40gb")
BATCH = DeviceBatch.of([DEVICE], ARRAYS, achieved=Achieved(0.8, 0.8, 5e-6))
COST = cost_batch(ARRAYS, BATCH)


def slipped(**energy_factors: float) -> BatchCost:
    assert COST.energy is not None
    return replace(
        COST, energy=replace(COST.energy, **{key: getattr(COST.energy, key) * f for key, f in energy_factors.items()})
    )


def test_the_right_cost_passes() -> None:
    check_cost(COST, ARRAYS, BATCH)
    check_cost(slipped(op_core_j=1.3), ARRAYS, BATCH)


@pytest.mark.parametrize("factor", [1 / SLIP, SLIP**2])
def test_latency(factor: float) -> None:
    wrong = replace(COST, op_latency_s=COST.op_latency_s * factor, energy=None)
    with pytest.raises(
        PhysicsError, match="time below the roofline" if factor < 1 else "time over 1e4 times the roofline"
    ):
        check_cost(wrong, ARRAYS, BATCH)


@pytest.mark.parametrize(
    ("factors", "bound"),
    [
        ({"op_core_j": SLIP}, "energy over power limit x time"),
        ({"op_memory_j": SLIP}, "energy over power limit x time"),
        ({"op_static_j": SLIP}, "energy over power limit x time"),
        ({"op_core_j": 1 / SLIP}, "energy below the least per operation"),
    ],
)
def test_energy(factors: dict[str, float], bound: str) -> None:
    with pytest.raises(PhysicsError, match=bound):
        check_cost(slipped(**factors), ARRAYS, BATCH)


def test_energy_without_a_known_limit_is_held_by_the_energy_per_mac() -> None:
    assert BATCH.energy is not None
    unlimited = replace(BATCH, energy=replace(BATCH.energy, limit_w=np.array([np.inf])))
    check_cost(COST, ARRAYS, unlimited)
    with pytest.raises(PhysicsError, match="energy per MAC outside 1e-15 to 1e-8 J"):
        check_cost(slipped(op_core_j=SLIP), ARRAYS, unlimited)


def test_figures_that_slipped_trip_the_model_itself() -> None:
    assert BATCH.energy is not None
    for field in ("floor_w", "vector_j_per_op", "read_j_per_byte"):
        wrong = replace(BATCH, energy=replace(BATCH.energy, **{field: getattr(BATCH.energy, field) * SLIP}))
        with pytest.raises(PhysicsError, match="energy over power limit"):
            cost_batch(ARRAYS, wrong)
    for field, factor, bound in (
        ("compute_fraction", SLIP, "utilisation"),
        ("bandwidth_fraction", SLIP, "utilisation"),
        ("compute_fraction", 0.0, "utilisation"),
        ("overhead_s", SLIP, "call overhead"),
    ):
        with pytest.raises(PhysicsError, match=bound):
            cost_batch(ARRAYS, replace(BATCH, **{field: getattr(BATCH, field) * factor}))


def test_energy_per_mac() -> None:
    checks.require_energy_per_mac(np.array([4.6e-12, 0.0]), np.array([1.0, 0.0]))  # 45 nm fp32; no MACs: left out
    for j_per_mac in (4.6e-12 / SLIP**2, 1.2e-11 * SLIP):
        with pytest.raises(PhysicsError, match="energy per MAC"):
            checks.require_energy_per_mac(j_per_mac, 1.0)


def test_a_batch_names_the_entry_that_fails() -> None:
    with pytest.raises(PhysicsError, match=r"utilisation outside \(0, 1\]: fraction = 70 \(entry 1\)"):
        checks.require_utilisation(np.array([0.7, 70.0, 0.8]))


def test_traffic() -> None:
    checks.require_traffic(1e9, 1e9)
    with pytest.raises(PhysicsError, match="compulsory"):
        checks.require_traffic(1e9 / SLIP, 1e9)


def test_capacity_is_a_physics_error_that_the_user_can_mend() -> None:
    checks.require_fits(0.95e9, 1e9)
    with pytest.raises(CapacityError, match="model offloading") as error:
        checks.require_fits(0.95e9 * SLIP, 1e9, "dram")
    assert isinstance(error.value, PhysicsError)
    assert isinstance(error.value, UserError)


def test_monotone() -> None:
    checks.require_monotone(np.array([1.0, 1.0, 2.0]), rising=True, what="latency over operations")
    checks.require_monotone(np.array([[3.0, 2.0], [1.0, 1.0]]), rising=False, what="latency over bandwidth")
    with pytest.raises(PhysicsError, match="latency over bandwidth must never rise"):
        checks.require_monotone(np.array([1.0, 1.0 * SLIP]), rising=False, what="latency over bandwidth")
    with pytest.raises(PhysicsError, match="must never fall"):
        checks.require_monotone(np.array([1.0, 1.0 / SLIP]), rising=True, what="latency")


def test_the_least_energies_are_those_of_7_nm_arithmetic_over_the_margin() -> None:
    # multiply + add in pJ, two operations per MAC
    for precision, multiply, add in (
        ("int8", 0.07, 0.007),
        ("bf16", 0.21, 0.11),
        ("fp16", 0.34, 0.16),
        ("fp32", 1.31, 0.38),
    ):
        assert checks.MIN_J_PER_OP[precision] * 4 == pytest.approx((multiply + add) / 2 * 1e-12)
