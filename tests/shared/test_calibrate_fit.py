"""The fit finds the figures that synthetic timings were made with, in spite of noise and of disturbed timings."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from shared.calibrate.devicefile import draft, with_fit
from shared.calibrate.fit import Fit, Samples, fit_device, samples_of
from shared.calibrate.measure import DENSITY, Measured
from shared.calibrate.points import Limits, micro_benchmarks
from shared.hardware import cost_batch, load_device
from shared.hardware.batch import DeviceBatch

GPU = {
    "device": "cuda",
    "name": "a board",
    "units": 132,
    "memory_bytes": 151e9,
    "torch": "2",
    "date": "2026-01-01",
    "caches": {},
}
CPU = {
    "device": "cpu", "name": "Some(R) Processor", "cores": 4, "memory_bytes": 16_000_000_000, "torch": "2", "date": "2026-01-01",
    "caches": {"l2": 4_000_000}, "threads": 4,
}  # fmt: skip
TRUTH = {
    "calibration.bandwidth_fraction": 0.8,
    "memory.l2.bandwidth": 1.1e13,
    "calibration.tile_half": 40.0,
    "calibration.operators.matmul.bf16.compute": 0.75,
    "calibration.operators.matmul.fp32.compute": 0.85,
    "calibration.operators.matmul.bf16.k_half": 150.0,
    "calibration.operators.matmul.bf16.bandwidth": 0.9,
    "calibration.operators.matmul.bf16.overhead": 2.5e-6,
    "calibration.operators.conv.bf16.compute": 0.4,
    "calibration.operators.pointwise.bf16.overhead": 1.5e-6,
    "calibration.operators.reduction.bf16.bandwidth": 0.5,
    "calibration.operators.gather.bf16.bandwidth": 0.25,
    "calibration.operators.copy.bf16.overhead": 4e-6,
    "calibration.operators.softmax.fp32.k_half": 400.0,
    "calibration.operators.layer_norm.fp32.vector": 0.05,
    "calibration.operators.layer_norm.fp32.k_half": 400.0,
    "calibration.operators.stem.bf16.compute": 0.05,
    "calibration.operators.sort.fp32.overhead": 2e-5,
}


@pytest.fixture(scope="module")
def samples() -> Samples:
    points = micro_benchmarks(["fp32", "bf16"], Limits(4e12, 6e9), density=DENSITY["cuda"])
    return samples_of([{**asdict(point), "seconds": 1.0} for point in points])


def measured(machine: dict[str, Any], points: int = 400) -> Measured:
    return Measured(machine, 0.01, [{}] * points, {}, [], [], [])


def synthetic(data: dict[str, Any], samples: Samples, truth: dict[str, float], noise: float) -> Samples:
    device, rng = load_device(data), np.random.default_rng(1)
    figures = {path: np.array([value]) for path, value in truth.items()}
    seconds = cost_batch(
        samples.arrays, DeviceBatch.varied(device, samples.arrays, figures, energy="none")
    ).op_latency_s[0]
    disturbed = np.where(rng.random(seconds.size) < 0.03, 3.0, 1.0)  # a few timings went wrong altogether
    return replace(samples, seconds=seconds * np.exp(noise * rng.standard_normal(seconds.size)) * disturbed)


@pytest.fixture(scope="module")
def recovered(samples: Samples) -> tuple[dict[str, Any], Fit]:
    data = draft(measured(GPU), samples, base=None)
    assert data["id"] == "h200_sxm_141gb_calibrated"  # found by its 132 units and 151e9 bytes
    return data, fit_device(data, synthetic(data, samples, TRUTH, 0.05))


@pytest.mark.parametrize("path", TRUTH)
def test_known_figures_are_recovered_from_noisy_timings(recovered: tuple[dict[str, Any], Fit], path: str) -> None:
    fit = recovered[1]
    allowed = 0.25 if path.endswith(("_half", "overhead")) else 0.12
    assert fit.values[path] == pytest.approx(TRUTH[path], rel=allowed)


def test_the_fit_error_is_that_of_the_noise(recovered: tuple[dict[str, Any], Fit]) -> None:
    fit = recovered[1]
    assert 0.02 < np.median(fit.all_errors) < 0.06  # median of |5 % normal| is 3.4 %
    data = with_fit(recovered[0], fit, measured(GPU))
    device = load_device(data)
    assert device.calibration.fit_error_rel is not None
    assert device.calibration.fit_error_rel.value == pytest.approx(float(fit.all_errors.mean()), rel=1e-3)
    assert device.figure("memory.l2.bandwidth").value == pytest.approx(fit.values["memory.l2.bandwidth"], rel=1e-3)


def test_a_class_without_points_enough_goes_with_the_one_it_is_like(samples: Samples) -> None:
    apart = draft(measured(GPU), samples, base=None)["calibration"]["operators"]
    assert {"stem", "conv1x1_odd", "sort", "topk", "scatter"} <= apart.keys()
    stems = np.flatnonzero((samples.classes == "stem") & (samples.precisions == "bf16"))
    few = samples.select(~np.isin(np.arange(samples.seconds.size), stems[7:]))
    data = draft(measured(GPU), few, base=None)
    assert "stem" not in data["calibration"]["operators"]
    fit = fit_device(data, synthetic(data, few, {}, 0.05))
    of_conv = np.isin(few.classes, ("conv", "stem"))
    assert len(fit.errors["conv"]) == of_conv.sum()  # stems are points of the law of convolutions
    on_a_cpu = draft(measured(CPU), samples, base=None)["calibration"]["operators"]
    assert not {"conv1x1_odd", "stem"} & on_a_cpu.keys()


def test_a_cpu_is_its_own_data_sheet(samples: Samples) -> None:
    flops = np.maximum(samples.arrays.flops, samples.arrays.vector_ops + 1.0)
    timed = replace(samples, seconds=flops / 1e11 + samples.arrays.bytes_moved / 2e10 + 1e-5)
    data = draft(measured(CPU), timed, base=None)
    device = load_device(data)
    assert device.id == "cpu_some_processor_4_threads"
    assert 0.8e11 < device.op_per_s("float32") <= 1e11
    assert 1.9e10 < device.bandwidth_bytes_per_s() <= 2e10
    assert device.size_bytes("l2") == 4_000_000
