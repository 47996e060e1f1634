"""The command: what it refuses, and one machine from its measurements to its device file and the table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.calibrate import clock, command, power
from shared.calibrate.devicefile import draft
from shared.calibrate.fit import samples_of
from shared.calibrate.measure import EAGER_SIZES, Measured, measure, save_json
from shared.calibrate.models import BUILT_IN, RoutedExperts
from shared.calibrate.points import Limits, Point, build, micro_benchmarks
from shared.calibrate.results import calibrated, load_measured
from shared.calibrate.table import write_table
from shared.calibrate.validate import Prediction, latency_s, summary, work_of
from shared.errors import UserError
from shared.hardware import DeviceBatch, cost_batch, load_device

MACHINE = {
    "device": "cuda", "name": "a board", "cores": 8, "cpu": "a host", "threads": 1, "units": 132, "memory_bytes": 151e9, "torch": "2",
    "date": "2026-01-01", "commit": "abc", "caches": {}, "base": None,
}  # fmt: skip
RESERVOIR = next(model for model in BUILT_IN if model.name == "reservoir_1024")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["calibrate=gpu"], "unknown calibrate 'gpu': did you mean 'cpu'? choose one of: cpu, cuda, table"),
        (["calibrate=cpu", "bas=x"], "unknown key of calibrate 'bas': did you mean 'base'?"),
        (["calibrate=table", "base=x"], "calibrate=table takes no base"),
        (["calibrate=cpu", "threads=0"], "threads=0 must be a whole number from 1 to"),
    ],
)
def test_a_wrong_command_is_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence.replace("?", r"\?")):
        command.run([*arguments, f"out={tmp_path}"])


def test_a_noisy_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "spread", lambda device: 0.4)
    with pytest.raises(UserError, match=r"too noisy to calibrate.*varies by 40% \(limit 15%\)"):
        measure("cpu")


def test_a_time_counts_when_it_recurs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5, 1, 9, 1.02 and 1.04 s three agree; the disturbed calls do not matter."""
    lengths = iter([0.0, 5.0, 1.0, 9.0, 1.02, 1.04, 7.0])
    now = [0.0]

    def call() -> None:
        now[0] += next(lengths)

    monkeypatch.setattr(clock.time, "thread_time", lambda: now[0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert clock.cpu_seconds(call) == pytest.approx(1.04)


def test_energy_of_a_window_is_the_counters_difference() -> None:
    joules = iter([100.0, 130.0])
    seen = power.window(lambda: torch.ones(10).sum(), lambda: next(joules), "cpu", seconds=0.05)
    assert seen.energy_j == 30.0
    assert seen.calls > 1
    assert seen.seconds >= 0.05


def test_every_micro_benchmark_runs_and_is_one_operator() -> None:
    points = micro_benchmarks(["fp32"], Limits(4e6, 5e5))
    ops = {point.op: point for point in points}
    assert set(ops) == set(EAGER_SIZES) | {
        "relu6",
        "product",
        "compare",
        "hardswish",
        "scale",
        "silu",
        "sigmoid",
        "sum",
        "max_pool",
        "int_mul",
        "int_xor",
        "int_mod",
    }
    with torch.inference_mode():
        for point in ops.values():
            module, inputs = build(point, "cpu")
            output = module(*inputs)
            assert torch.isfinite(output if isinstance(output, torch.Tensor) else output[0]).all()
    samples_of([{**asdict(point), "seconds": 1.0} for point in points])  # raises where a trace has not one row


def test_points_keep_within_the_limits_and_are_the_same_again() -> None:
    points = micro_benchmarks(["bf16"], Limits(1e8, 1e6))
    assert points == micro_benchmarks(["bf16"], Limits(1e8, 1e6))
    assert len(micro_benchmarks(["bf16"], Limits(1e8, 1e6), density=2.0)) > 1.7 * len(points)
    for point in points:
        if point.op == "linear":
            m, n, k = point.sizes
            assert 2 * m * n * k <= 1e8
            assert 2 * (m * n + n * k + m * k) <= 1e6


def test_routed_experts_against_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    layer, tokens = RoutedExperts(8, 16, 4).double(), torch.randn(12, 8, dtype=torch.float64)
    weight, expert = layer.router(tokens).softmax(-1).topk(2, -1)
    capacity, taken, expected = 8, [0] * 4, torch.zeros_like(tokens)  # 1.25 x 2 x 12 / 4 = 7.5, rounded up
    order = expert.flatten().argsort(stable=True)
    for pair in order.tolist():
        token, e = pair // 2, int(expert.flatten()[pair])
        taken[e] += 1
        if taken[e] <= capacity:
            hidden = torch.nn.functional.gelu(tokens[token] @ layer.up[e])
            expected[token] += weight.flatten()[pair] * (hidden @ layer.down[e])
    assert torch.allclose(layer(tokens), expected, atol=1e-12)


@pytest.fixture(scope="module")
def measured() -> Measured:
    """A made-up board that the laws describe exactly: the fit must find it, and its held-out errors vanish."""
    points = [asdict(point) for point in micro_benchmarks(["fp32"], Limits(1e12, 1e9))]
    found = Measured(
        MACHINE, 0.01, [{**row, "seconds": 1.0} for row in points], dict.fromkeys(EAGER_SIZES, 1e-5), [], [], ["one"]
    )
    samples = samples_of(found.points)
    data = draft(found, samples, None)
    device = load_device(data)
    seconds = cost_batch(samples.arrays, DeviceBatch.of([device], samples.arrays, energy="none")).op_latency_s[0]
    for row, value in zip(found.points, seconds, strict=True):
        row["seconds"] = float(value)
    work = work_of(RESERVOIR, 16, "fp32")
    row = {"model": RESERVOIR.name, "batch": 16, "dtype": "fp32"}
    found.held_out.append({**row, "mode": "graph", "seconds": latency_s(work, device, "graph")})
    found.held_out.append({**row, "mode": "eager", "seconds": 2e-3})
    found.held_out.append({**row, "mode": "eager", "seconds": 2e-3, "model": "gone"})
    for op, sizes, watts in (
        ("linear", (4096, 4096, 4096), 400.0),
        ("add", (64, 1024, 8192), 300.0),
        ("add", (4, 256, 1024), 120.0),  # in the cache
        ("gelu", (8, 64, 64), 110.0),
    ):
        arrays = samples_of([{**asdict(Point(op, sizes, "fp32")), "seconds": 1.0}]).arrays
        call_s = float(cost_batch(arrays, DeviceBatch.of([device], arrays, energy="none")).latency_s[0])
        calls = round(4.0 / call_s)
        energy = {"calls": calls, "seconds": calls * call_s, "energy_j": watts * calls * call_s}
        found.energy.append({"op": op, "sizes": sizes, "dtype": "fp32", **energy})
    for repeat in range(3):
        energy = {"repeat": repeat, "calls": 10, "seconds": 5.0, "energy_j": 1500.0}
        found.energy.append({**row, **energy})
    return found


def test_from_measurements_to_device_file_and_table(measured: Measured, tmp_path: Path) -> None:
    path = tmp_path / "board.json"
    save_json(measured, path)
    assert load_measured(path).points[0]["op"] == measured.points[0]["op"]
    result = calibrated(path, tmp_path, lambda: [RESERVOIR])
    device = load_device(tmp_path / "board.yaml")
    assert device.id == "board"
    assert device.calibration.fit_error_rel is not None
    assert device.calibration.fit_error_rel.value < 0.02
    assert device.calibration.held_out_error_rel is not None
    assert device.calibration.held_out_error_rel.value < 0.03
    assert device.calibration.roofline_error_rel is not None
    assert device.calibration.roofline_error_rel.value > 0.5
    assert device.energy.board is not None
    assert device.energy.board.floor is not None
    assert device.energy.board.floor.value == pytest.approx(110.0, rel=0.1)  # a launch and little else
    text = write_table([result], tmp_path / "README.md").read_text()
    assert "| graph, fp32 | 1 |" in text
    assert "a board, 8 cores of a host, torch 2, measured on 2026-01-01 at commit abc" in text
    assert "| reservoir_1024 | 16 | fp32 | 3 | 150 |" in text  # 1500 J in ten calls
    assert "Left out (2): one; gone: no builder of that name any more" in text


def test_an_unknown_board_needs_its_data_sheet(measured: Measured) -> None:
    samples = samples_of(measured.points[:3])
    with pytest.raises(
        UserError, match=r"no data sheet in conf/device fits a board with 7 units and 151 GB: say which with base=ID"
    ):
        draft(replace(measured, machine={**MACHINE, "units": 7}), samples, None)


def test_a_file_that_is_no_measurement_is_said(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"claims": []}))
    with pytest.raises(UserError, match="holds no measurements"):
        load_measured(path)
    with pytest.raises(UserError, match="nothing was measured"):
        command.write_all(tmp_path / "empty", tmp_path, lambda *progress: None)


def test_rates_of_a_cpu_never_exceed_its_peaks() -> None:
    machine: dict[str, Any] = {
        **MACHINE,
        "device": "cpu",
        "name": "cpu",
        "caches": {"l2": 2_000_000},
        "memory_bytes": 16_000_000_000,
    }
    points = [{**asdict(point), "seconds": 1e-3} for point in micro_benchmarks(["fp32"], Limits(1e9, 1e8), density=0.5)]
    samples = samples_of(points)
    device = load_device(draft(Measured(machine, 0.0, points, {}, [], [], []), samples, None))
    assert (samples.arrays.flops / samples.seconds).max() <= device.op_per_s("float32")
    assert np.isfinite(device.bandwidth_bytes_per_s())


def test_the_papers_models_have_a_line_of_their_own() -> None:
    def prediction(model: str, mode: str, ratio: float) -> Prediction:
        return Prediction(model, 16, "bf16", mode, 1.0, ratio, ratio, ratio)

    rows = summary(
        [prediction("resnet50", "graph", 1.1), prediction("a_layer", "graph", 0.7), prediction("a_layer", "eager", 2.0)]
    )
    found = {row["group"]: (row["n"], row["calibrated_median"]) for row in rows}
    assert found["graph, the papers' models"] == (1, pytest.approx(0.3))
    assert found["eager, the papers' models"] == (1, pytest.approx(1.0))
    assert found["graph, all"] == (2, pytest.approx(0.2))


def test_fits_of_others_are_listed_with_their_errors(tmp_path: Path) -> None:
    names = ("a100_sxm4_80gb", "l40", "jetson_nano")
    text = write_table([], tmp_path / "README.md", [load_device(name) for name in names]).read_text()
    assert "| a100_sxm4_80gb | 0.713 | 0.845 | 7.5 | 8.2 % | 8.9 % (6.8 % to 28.0 %) |" in text
    assert "| l40 | 148 | 3.3 (fp32) | 95 | 3.3 % |" in text
    assert "| a100_sxm4_80gb | nvlink_pair | 28.7 | 1.89e+11 | 6.0 % |" in text
    assert "jetson_nano" not in text  # nobody fitted it
