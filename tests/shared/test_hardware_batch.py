"""The batched model equals the single one, follows figures by their path, and is fast."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from shared.errors import UserError
from shared.hardware import Achieved, Device, DeviceBatch, WorkloadArrays, cost, cost_batch, load_device
from tests.shared.test_hardware_schema import fig, put

ACHIEVED = Achieved(0.7, 0.8, 5e-6)


def random_workload(n: int = 20) -> WorkloadArrays:
    rng = np.random.default_rng(0)
    return WorkloadArrays.from_rows(
        [
            {
                "name": f"op{i}",
                "dtype": ("float32", "bfloat16")[i % 2],
                "flops": 10 ** rng.uniform(8, 11) if i % 3 else 0.0,
                "vector_ops": 10 ** rng.uniform(5, 8),
                "bytes_read": 10 ** rng.uniform(5, 8),
                "bytes_written": 10 ** rng.uniform(5, 8),
                "count": int(rng.integers(1, 12)),
            }
            for i in range(n)
        ]
    )


def test_entries_of_a_batch_are_single_costs() -> None:
    arrays = random_workload()
    devices = [load_device(name) for name in ("a100_sxm4_40gb", "h200_sxm_141gb", "a100_sxm4_40gb")]
    result = cost_batch(arrays, DeviceBatch.of(devices, arrays, achieved=ACHIEVED))
    assert result.op_latency_s.shape == (3, 20)
    for i, device in enumerate(devices):
        single = cost(arrays, device, achieved=ACHIEVED)
        assert result.op_latency_s[i] == pytest.approx(single.op_latency_s, rel=1e-12)
        assert result.energy_j[i] == pytest.approx(single.energy_j, rel=1e-12)
        assert tuple(result.bound[i]) == single.bound
    assert result.device == ("a100_sxm4_40gb", "h200_sxm_141gb", "a100_sxm4_40gb")


def test_calibrations_and_errors_stay_with_their_device() -> None:
    arrays = WorkloadArrays.from_rows([{"name": "mm", "dtype": "float16", "flops": 1e11, "bytes_read": 1e6}])
    devices = [load_device(name) for name in ("a100_sxm4_80gb", "h100_sxm5_80gb", "a40_48gb")]
    result = cost_batch(arrays, DeviceBatch.of(devices, arrays))
    by_hand = [
        1e11 / (3.12e14 * 0.713) + 7.5e-6,
        1e11 / (9.89e14 * 0.712) + 7.8e-6,
        1e11 / (1.497e14 * 0.732) + 10.9e-6,
    ]
    assert result.latency_s == pytest.approx(by_hand)
    assert result.model_error_rel == (0.089, 0.119, 0.091)
    with pytest.raises(UserError, match="no energy for this workload: device 'a100_sxm4_80gb' has no figure"):
        _ = result.energy_j


def test_one_device_without_energy_takes_it_from_the_whole_batch() -> None:
    arrays = random_workload()
    devices = [load_device(name) for name in ("h200_sxm_141gb", "rtx_4090")]
    result = cost_batch(arrays, DeviceBatch.of(devices, arrays, ideal=True))
    assert result.latency_s.shape == (2,)
    with pytest.raises(UserError, match="rtx_4090"):
        _ = result.energy_j


def moved_device(bandwidth: float, floor: float) -> Device:
    raw = put("memory.dram.bandwidth.value", bandwidth)
    raw["energy"] = {
        "board": {
            "floor": fig(floor, "W", scope="board"),
            "per_op": {"fp32": fig(5e-12, "J/op", scope="board")},
            "per_byte": {"dram": fig(1e-10, "J/B", scope="board")},
        }
    }
    return load_device(raw)


def test_varied_figures_equal_devices_with_these_figures() -> None:
    arrays = WorkloadArrays.from_rows(
        [
            {
                "name": "a",
                "dtype": "float32",
                "flops": 1e9,
                "vector_ops": 1e7,
                "bytes_read": 2e8,
                "bytes_written": 1e8,
                "count": 3,
            }
        ]
    )
    bandwidths, floors = np.array([5e10, 1e11, 4e11]), np.array([10.0, 20.0, 30.0])
    batch = DeviceBatch.varied(
        moved_device(1e11, 20), arrays, {"memory.dram.bandwidth": bandwidths, "energy.board.floor": floors}, ideal=True
    )
    result = cost_batch(arrays, batch)
    for i, (bandwidth, floor) in enumerate(zip(bandwidths, floors, strict=True)):
        single = cost(arrays, moved_device(bandwidth, floor), ideal=True)
        assert result.latency_s[i] == pytest.approx(single.latency_s, rel=1e-12)
        assert result.static_j[i] == pytest.approx(single.static_j, rel=1e-12)


def test_a_batch_names_the_figures_that_it_depends_on() -> None:
    arrays = random_workload()
    h200 = load_device("h200_sxm_141gb")
    batch = DeviceBatch.of([h200], arrays, achieved=Achieved(overhead_s=5e-6))
    assert set(batch.figures) == {
        "peak.fp32",
        "peak.bf16",
        "memory.dram.bandwidth",
        "calibration.compute_fraction",
        "calibration.bandwidth_fraction",
        "energy.board.floor",
        "energy.board.per_op.fp32",
        "energy.board.per_op.bf16",
        "energy.board.per_byte.dram",
        "power.limit",
    }


def test_a_figure_without_influence_changes_nothing_and_a_wrong_path_is_an_error() -> None:
    arrays, h200 = random_workload(), load_device("h200_sxm_141gb")
    samples = {"peak.fp8": np.array([1e15, 2e15])}
    latency_s = cost_batch(arrays, DeviceBatch.varied(h200, arrays, samples, ideal=True)).latency_s
    assert latency_s[0] == latency_s[1] == cost(arrays, h200, ideal=True).latency_s
    with pytest.raises(UserError, match=r"unknown figure of device 'h200_sxm_141gb' 'peak\.fp9': did you mean"):
        DeviceBatch.varied(h200, arrays, {"peak.fp9": np.ones(3)}, ideal=True)


def test_thousands_of_samples_at_once_beat_a_loop_and_reach_1e5_per_second() -> None:
    arrays, device, n = random_workload(20), load_device("h200_sxm_141gb"), 10_000
    samples = {"memory.dram.bandwidth": np.geomspace(2e12, 8e12, n)}
    batch = replace(DeviceBatch.varied(device, arrays, samples, achieved=ACHIEVED), swept=False)  # with all checks

    def seconds(function: object, repeats: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    batched = seconds(lambda: cost_batch(arrays, batch), 5) / n
    looped = seconds(lambda: cost(arrays, device, achieved=ACHIEVED), 50)
    assert looped / batched > 20  # a ratio inside one run
    assert 1 / batched > 1e5
