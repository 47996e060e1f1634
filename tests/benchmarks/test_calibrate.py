"""Cost evaluations by the thousand, as a fit and a sensitivity run make them: three figures, and laws by class of operator.

The rate is a bar of its own (100,000 evaluations of one workload a second); it is taken on the thread's own clock, which other programs
do not move, and exceeded many times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch

from shared.hardware import DeviceBatch, WorkloadArrays, cost, cost_batch, load_device
from shared.hardware.device import Device
from shared.measure import measure
from shared.workload import meta_model, trace
from tests.shared.test_hardware_efficiency import board

SAMPLES = 2048
BAR_PER_S = 1e5


def varied(device: Device, arrays: WorkloadArrays, paths: tuple[str, ...]) -> Callable[[], Any]:
    rng = np.random.default_rng(0)
    figures = {path: device.figure(path).value * rng.uniform(0.8, 1.0, SAMPLES) for path in paths}
    return lambda: cost_batch(arrays, DeviceBatch.varied(device, arrays, figures, energy="none"))


@pytest.mark.parametrize("laws", [False, True])
def test_cost_evaluations_a_second(benchmark: Any, laws: bool) -> None:
    """DeiT-S on 2048 variants of a device, against as many calls for one device as take as long."""
    if laws:
        device = load_device(board())
        rows = WorkloadArrays.from_rows([{"name": "aten.mm", "dtype": "float32", "flops": 1e9, "bytes_read": 1e6}] * 8)
        arrays = replace(rows, kind=("matmul",) * 8, shape=((1, 512, 512, 512),) * 8)
        paths = ("peak.fp32", "memory.dram.bandwidth", "calibration.operators.matmul.fp32.compute")
    else:
        work = trace(
            meta_model(timm.create_model, "deit_small_patch16_224"), torch.empty(1, 3, 224, 224, device="meta")
        )
        device, arrays = load_device("a100_sxm4_80gb"), WorkloadArrays.from_workload(work.compressed())
        paths = ("peak.fp32", "memory.dram.bandwidth", "calibration.overhead")
    at_once = varied(device, arrays, paths)
    at_once()
    rates = []
    for _ in range(5):
        start = time.thread_time()
        at_once()
        rates.append(SAMPLES / (time.thread_time() - start))
    ratio = measure({"many": at_once, "one": lambda: cost(arrays, device, energy="none")}, rounds=7).ratio(
        "many", "one"
    )
    benchmark.extra_info["evaluations a second"] = max(rates)
    benchmark.extra_info[f"ratio: {SAMPLES} at once / one"] = ratio.median
    benchmark(at_once)
    assert max(rates) > BAR_PER_S
    assert ratio.high < SAMPLES / 10
