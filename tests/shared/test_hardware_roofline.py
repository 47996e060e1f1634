"""Roofline and energy: closed forms by hand, invariants by property, and no default where a figure is missing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from shared.errors import UserError
from shared.hardware import (
    Achieved,
    CapacityError,
    ConstantPower,
    Device,
    PhysicsError,
    WorkloadArrays,
    cost,
    load_device,
)
from shared.workload.table import Op, Workload
from tests.shared.test_hardware_schema import fig, put

# 1e12 fp32 op/s, 1e11 B/s; board model 20 W + 5e-12 J/op + 1e-10 J/B, limit 100 W
MACHINE = put(
    "energy.board",
    {
        "floor": fig(20.0, "W", scope="board"),
        "per_op": {"fp32": fig(5e-12, "J/op", scope="board")},
        "per_byte": {"dram": fig(1e-10, "J/B", scope="board")},
    },
)
ROWS = WorkloadArrays.from_rows(
    [
        # 3e9 op = 3 ms of compute, 1e8 + 1e8 B = 2 ms of memory; called twice
        {"name": "matmul", "dtype": "float32", "flops": 3e9, "bytes_read": 1e8, "bytes_written": 1e8, "count": 2},
        # 1e8 vector op = 0.1 ms, 4e8 B = 4 ms
        {"name": "gelu", "dtype": "float32", "vector_ops": 1e8, "bytes_read": 2e8, "bytes_written": 2e8},
    ]
)


@pytest.fixture
def device() -> Device:
    return load_device(MACHINE)


def test_ideal_roofline_by_hand(device: Device) -> None:
    result = cost(ROWS, device, ideal=True)
    assert result.op_latency_s == pytest.approx([6e-3, 4e-3])
    assert result.latency_s == pytest.approx(10e-3)
    assert result.bound == ("compute", "memory")


def test_achieved_fractions_and_overhead_by_hand(device: Device) -> None:
    achieved = Achieved(compute=0.5, bandwidth=0.8, overhead_s=1e-5)
    # 2 x (max(3/0.5, 2/0.8) + 0.01) ms and max(0.1/0.5, 4/0.8) + 0.01 ms
    assert cost(ROWS, device, achieved=achieved).op_latency_s == pytest.approx([12.02e-3, 5.01e-3])


def test_fractions_may_differ_by_row(device: Device) -> None:
    achieved = Achieved(compute=np.array([0.25, 0.01]), bandwidth=1.0, overhead_s=np.array([0.0, 1e-4]))
    result = cost(ROWS, device, achieved=achieved)
    assert result.op_latency_s == pytest.approx([2 * 12e-3, 10.1e-3])
    assert result.bound == ("compute", "compute")


def test_overhead_binds_many_small_calls(device: Device) -> None:
    tiny = WorkloadArrays.from_rows(
        [{"name": "add", "dtype": "float32", "vector_ops": 1e3, "bytes_read": 4e3, "count": 1000}]
    )
    result = cost(tiny, device, achieved=Achieved(1.0, 1.0, 5e-6))
    assert result.latency_s == pytest.approx(1000 * (4e-8 + 5e-6))
    assert result.bound == ("overhead",)


def test_matrix_and_vector_work_of_one_call_add_up(device: Device) -> None:
    row = WorkloadArrays.from_rows([{"name": "attention", "dtype": "float32", "flops": 1e9, "vector_ops": 5e8}])
    assert cost(row, device, ideal=True).latency_s == pytest.approx(1.5e-3)


def test_energy_terms_by_hand(device: Device) -> None:
    result = cost(ROWS, device, ideal=True)
    assert result.core_j == pytest.approx((6e9 + 1e8) * 5e-12)  # 30.5 mJ
    assert result.memory_j == pytest.approx((4e8 + 4e8) * 1e-10)  # 80 mJ
    assert result.static_j == pytest.approx(20 * 10e-3)  # 200 mJ
    assert result.energy_j == pytest.approx(0.3105)
    assert result.power_w == pytest.approx(31.05)
    assert [row["core_j"] for row in result.rows()] == pytest.approx([30e-3, 0.5e-3])


def test_static_energy_is_paid_during_overhead_too(device: Device) -> None:
    slow = cost(ROWS, device, achieved=Achieved(1.0, 1.0, 1e-3))
    assert slow.latency_s == pytest.approx(13e-3)
    assert slow.static_j == pytest.approx(20 * 13e-3)
    assert slow.core_j == pytest.approx(cost(ROWS, device, ideal=True).core_j)


def test_board_power_is_clipped_at_the_limit() -> None:
    hot = dict(MACHINE, power={"limit": fig(30.0, "W", scope="board")})
    result = cost(ROWS, load_device(hot), ideal=True)
    # matmul: 20 W + (30 + 40) mJ / 6 ms = 31.7 W > 30 W, so its dynamic energy is 10 W x 6 ms; gelu: 20 + 40.5 mJ / 4 ms = 30.1 W
    assert result.power_w == pytest.approx(30)
    assert result.energy_j == pytest.approx(30 * 10e-3)
    assert result.core_j + result.memory_j == pytest.approx(10 * 10e-3)
    assert result.rows()[0]["core_j"] == pytest.approx(60e-3 * 3 / 7)  # clipped in proportion
    assert result.latency_s == pytest.approx(10e-3)


def test_a_power_far_over_the_limit_is_a_unit_slip_and_not_clipped() -> None:
    energy = {"board": dict(MACHINE["energy"]["board"], per_op={"fp32": fig(4e-10, "J/op", scope="board")})}
    with pytest.raises(PhysicsError, match="energy over power limit x time"):
        cost(ROWS, load_device(dict(MACHINE, energy=energy)), ideal=True)


def test_component_power_over_the_limit_is_an_error() -> None:
    board = MACHINE["energy"]["board"]
    component = {
        "floor": fig(20.0, "W", scope="package"),
        "per_op": {"fp32": fig(5e-11, "J/op", scope="package")},
        "per_byte": {"dram": fig(1e-10, "J/B", scope="device")},
    }
    device = load_device(
        dict(MACHINE, energy={"board": board, "component": component}, power={"limit": fig(60.0, "W", scope="board")})
    )
    assert cost(ROWS, device, ideal=True).core_j == pytest.approx(
        30.5e-3
    )  # auto takes the board's, 45 mJ under the limit
    with pytest.raises(PhysicsError, match="energy over power limit"):
        cost(ROWS, device, ideal=True, energy="component")  # 20 W + 340 mJ / 6 ms = 76.7 W


def test_constant_power_is_all_static(device: Device) -> None:
    result = cost(ROWS, device, ideal=True, energy=ConstantPower(42.0))
    assert (result.core_j, result.memory_j) == (0, 0)
    assert result.energy_j == pytest.approx(42 * 10e-3)


def test_a_partial_energy_model_is_not_completed_from_another_scope() -> None:
    energy = {
        "board": {k: v for k, v in MACHINE["energy"]["board"].items() if k != "floor"},
        "component": {
            "floor": fig(20.0, "W", scope="package"),
            "per_byte": {"dram": fig(3e-11, "J/B", scope="device")},
        },
    }
    result = cost(ROWS, load_device(dict(MACHINE, energy=energy)), ideal=True)
    assert result.latency_s == pytest.approx(10e-3)
    assert not result.has_energy
    with pytest.raises(UserError, match=r"no figure energy\.board\.floor.*ConstantPower"):
        _ = result.energy_j
    with pytest.raises(UserError, match=r"no figure energy\.component\.per_op\.fp32"):
        cost(ROWS, load_device(dict(MACHINE, energy=energy)), ideal=True, energy="component")
    with pytest.raises(UserError, match="unknown energy model 'boards'"):
        cost(ROWS, load_device(MACHINE), ideal=True, energy="boards")  # type: ignore[arg-type]


def test_energy_may_be_left_out(device: Device) -> None:
    result = cost(ROWS, device, ideal=True, energy="none")
    with pytest.raises(UserError, match="energy was not asked for"):
        _ = result.power_w
    assert set(result.rows()[0]) == {"name", "latency_s", "bound"}


def test_without_a_calibration_the_caller_must_choose(device: Device) -> None:
    with pytest.raises(UserError, match=r"has no calibration\.compute_fraction: give Achieved.*ideal=True"):
        cost(ROWS, device)
    with pytest.raises(UserError, match=r"has no calibration\.overhead"):
        cost(ROWS, device, achieved=Achieved(0.5, 0.5))
    with pytest.raises(UserError, match="either ideal=True or achieved"):
        cost(ROWS, device, achieved=Achieved(1, 1, 0), ideal=True)
    with pytest.raises(UserError, match="must be a number or one for each of the 2 rows"):
        cost(ROWS, device, achieved=Achieved(np.ones(3), 1, 0))


def test_a_calibrated_device_supplies_fractions_and_its_published_error() -> None:
    a100 = load_device("a100_sxm4_80gb")
    rows = WorkloadArrays.from_rows([{"name": "mm", "dtype": "float16", "flops": 3.12e11, "bytes_read": 1e6}])
    assert cost(rows, a100).latency_s == pytest.approx(1e-3 / 0.713 + 7.5e-6)
    assert cost(rows, a100).model_error_rel == 0.089
    assert cost(rows, a100, ideal=True).latency_s == pytest.approx(1e-3)
    assert cost(rows, a100, ideal=True).model_error_rel == 0.44
    eager = cost(rows, a100, achieved=Achieved(overhead_s=21e-6))
    assert eager.latency_s == pytest.approx(1e-3 / 0.713 + 21e-6)
    assert eager.model_error_rel is None  # the published error is not of this model
    assert cost(rows, a100, achieved=Achieved(overhead_s=21e-6, error_rel=0.2)).model_error_rel == 0.2


def test_power_of_measured_boards() -> None:
    def streaming_and_computing(name: str, op_per_s: float, bytes_per_s: float) -> float:
        row = [{"name": "triad", "dtype": "float32", "vector_ops": op_per_s, "bytes_read": bytes_per_s}]
        device = load_device(name)
        share = bytes_per_s / device.bandwidth_bytes_per_s()
        return cost(WorkloadArrays.from_rows(row), device, achieved=Achieved(1.0, share, 0.0)).power_w

    # one second of work each: P0 + e_f op/s + e_b B/s by hand
    assert streaming_and_computing("a100_sxm4_40gb", 1e10, 1.36e12) == pytest.approx(66.5 + 0.052 + 160.48, abs=0.01)
    assert streaming_and_computing("a100_sxm4_40gb", 1e13, 1.36e12) == pytest.approx(66.5 + 52 + 160.48, abs=0.01)
    assert streaming_and_computing("h200_sxm_141gb", 1e10, 3.5e12) == pytest.approx(105 + 0.058 + 427, abs=0.01)
    # the best bf16 matmul draws the limit
    mm = WorkloadArrays.from_rows([{"name": "mm", "dtype": "bfloat16", "flops": 7.945e14, "bytes_read": 1e11}])
    h200 = cost(mm, load_device("h200_sxm_141gb"), achieved=Achieved(overhead_s=0.0))
    assert h200.power_w == pytest.approx(700, rel=5e-3)
    assert h200.energy_j / 7.945e14 == pytest.approx(0.88e-12, rel=1e-2)  # all in


def test_component_model_by_hand() -> None:
    rows = WorkloadArrays.from_rows(
        [{"name": "mm", "dtype": "int8", "flops": 1.38e13, "bytes_read": 1e10, "bytes_written": 0.0}]
    )
    result = cost(rows, load_device("tpu_v4i"), ideal=True)
    assert result.latency_s == pytest.approx(0.1)
    assert result.static_j == pytest.approx(5.5)
    assert result.core_j == pytest.approx(1.38e13 / 2 * 0.084e-12)  # MACs x J per MAC
    assert result.memory_j == pytest.approx(8e10 * 7.03e-12)  # bits x J per bit


def test_read_and_write_paths_of_a_memory_level() -> None:
    rows = WorkloadArrays.from_rows([{"name": "copy", "dtype": "int8", "bytes_read": 2.05e9, "bytes_written": 1.02e9}])
    result = cost(rows, load_device("tpu_v4i"), ideal=True, level="cmem")
    assert result.latency_s == pytest.approx(2e-3)
    assert result.memory_j == pytest.approx(8 * (2.05e9 * 1.88e-12 + 1.02e9 * 2.36e-12))


def test_memory_level_is_asked_for_by_name() -> None:
    npu = load_device("ethos_u55_256")
    rows = WorkloadArrays.from_rows([{"name": "conv", "dtype": "int8", "flops": 2.56e6, "bytes_read": 1e5}])
    with pytest.raises(UserError, match="no memory level dram: it has sram, flash, shram"):
        cost(rows, npu, ideal=True)
    assert cost(rows, npu, ideal=True, level="sram").latency_s == pytest.approx(2.5e-5)
    assert cost(rows, npu, ideal=True, level="flash").latency_s == pytest.approx(2e-4)


def test_data_movement_needs_no_arithmetic_rate(device: Device) -> None:
    rows = WorkloadArrays.from_rows([{"name": "copy", "dtype": "bool", "bytes_read": 1e8, "bytes_written": 1e8}])
    assert cost(rows, device, ideal=True).latency_s == pytest.approx(2e-3)
    rows = WorkloadArrays.from_rows([{"name": "mm", "dtype": "bfloat16", "flops": 1.0}])
    with pytest.raises(UserError, match="no peak rate for bfloat16"):
        cost(rows, device, ideal=True)


def test_capacity_and_compulsory_traffic(device: Device) -> None:
    cost(ROWS, device, ideal=True, memory_in_use_bytes=9.5e8, compulsory_bytes=8e8)
    with pytest.raises(CapacityError, match="do not fit into 95% of the 1e\\+09 bytes of dram of device 'toy'"):
        cost(ROWS, device, ideal=True, memory_in_use_bytes=9.6e8)
    with pytest.raises(PhysicsError, match="below the compulsory traffic"):
        cost(ROWS, device, ideal=True, compulsory_bytes=8.1e8)


def test_arrays_are_validated_and_read_from_a_workload() -> None:
    fields = {
        field: getattr(ROWS, field)
        for field in ("name", "dtype", "flops", "vector_ops", "bytes_read", "bytes_written", "count")
    }
    again = WorkloadArrays.from_workload(SimpleNamespace(arrays=lambda: fields))
    assert again.total("flops") == 6e9
    assert again.total("bytes_moved") == 8e8
    for wrong in ({"flops": np.ones(3)}, {"flops": np.array([-1.0, 0])}, {"flops": np.array([np.nan, 0])}, {"count": np.array([0, 1])},
                  {"count": np.array([1.5, 1])}, {"dtype": ("float32",)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"must|has"):
            WorkloadArrays(**(fields | wrong))


def test_a_traced_workload_has_the_columns_that_the_model_reads() -> None:
    work = Workload(
        (
            Op(
                "mm",
                "head",
                "matmul",
                "forward",
                "float32",
                flops=3_000_000,
                vector_ops=0,
                bytes_read=10,
                bytes_written=20,
                count=5,
            ),
            Op(
                "relu",
                "head",
                "elementwise",
                "forward",
                "float32",
                flops=0,
                vector_ops=7,
                bytes_read=1,
                bytes_written=2,
            ),
        )
    )
    arrays = WorkloadArrays.from_workload(work)
    assert arrays.name == ("mm", "relu")
    assert arrays.total("flops") == work.flops == 15_000_000
    assert arrays.total("bytes_moved") == work.bytes == 153
    # 3 us a call at 1e12 op/s, and 3 B at 1e11 B/s
    assert cost(arrays, load_device(MACHINE), ideal=True).op_latency_s == pytest.approx([15e-6, 3e-11])
