"""Operator laws: the use of tiles and waves by hand, caches by working set, and that nothing good ever slows an operation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.claims import Claim
from shared.errors import UserError
from shared.experiment import Measurement
from shared.hardware import Achieved, DeviceBatch, WorkloadArrays, cost, cost_batch, load_device
from shared.hardware.efficiency import operator_classes
from shared.hardware.launch import launched_latency_s
from shared.judge import Situation, judge
from shared.verdict import Verdict


def fig(value: float, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit, "rel_unc": 0.1, "tag": "measured", "source": "test"}


def board(**calibration: Any) -> dict[str, Any]:
    """Four units, 1e12 op/s, 1e11 B/s of DRAM, 1 MB of cache at 1e12 B/s; every share is 1, every overhead 1 ns."""
    law = {"bandwidth": fig(1.0, "ratio"), "overhead": fig(1e-9, "s")}
    matrix = {"fp32": {**law, "compute": fig(1.0, "ratio"), "k_half": fig(100.0, "count")}}
    rows = {**law, "k_half": fig(300.0, "count")}
    return {
        "id": "board", "title": "a board", "kind": "gpu", "compute": {"units": fig(4.0, "count")},
        "peak": {"fp32": fig(1e12, "op/s"), "bf16": fig(2e12, "op/s")},
        "memory": {
            "dram": {"size": fig(1e10, "B"), "bandwidth": fig(1e11, "B/s")},
            "l2": {"size": fig(1e6, "B"), "bandwidth": fig(1e12, "B/s")},
        },
        "calibration": {
            "bandwidth_fraction": fig(1.0, "ratio"), "compute_fraction": fig(0.5, "ratio"), "overhead": fig(1e-5, "s"),
            "tile_half": fig(64.0, "count"), "caches": ["l2"],
            "operators": {"matmul": matrix, "attention": matrix,
                "pointwise": {"fp32": law}, "layer_norm": {"fp32": rows}, "softmax": {"fp32": rows}},
            "fit_error_rel": fig(0.05, "ratio"), "held_out_error_rel": fig(0.08, "ratio"), "simple_error_rel": fig(0.2, "ratio"),
            **calibration,
        },
    }  # fmt: skip


def product(m: int, n: int, k: int, batch: int = 1, kind: str = "matmul") -> WorkloadArrays:
    return WorkloadArrays(
        name=("op",), dtype=("float32",), flops=np.array([2.0 * batch * m * n * k]), vector_ops=np.zeros(1), bytes_read=np.zeros(1),
        bytes_written=np.ones(1), count=np.ones(1, dtype=np.int64), kind=(kind,), shape=((batch, m, n, k),),
    )  # fmt: skip


def stream(size: float) -> WorkloadArrays:
    return WorkloadArrays(
        name=("aten.add",), dtype=("float32",), flops=np.zeros(1), vector_ops=np.ones(1), bytes_read=np.array([size / 2]),
        bytes_written=np.array([size / 2]), count=np.ones(1, dtype=np.int64), kind=("vector",), shape=((),),
    )  # fmt: skip


def seconds(work: WorkloadArrays, data: dict[str, Any] | None = None) -> float:
    return cost(work, load_device(data or board()), energy="none").latency_s - 1e-9


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        (
            (256, 512, 900),
            900 / 1012,
        ),  # four tiles of 256 x 128 fill the four units; 57 times 16 steps, and 100
        # Two tiles of 128 x 128, 8/7 slower, their 4900 steps split in two: 154 times 16, 100 of waiting and 512 of adding up. One tile
        # of 256 x 128 split in four takes 4 x 32768 x (1232 + 612), which is more.
        ((256, 128, 4900), 256 * 128 * 4900 / (4 * 128 * 128 * (2464 + 612) * 8 / 7)),
        # Five tiles of 256 x 128 take two waves; ten of 128 x 128, 8/7 slower, take three: 3 x 16384 x 8/7 < 2 x 32768.
        ((256, 640, 100), 100 / 212 * 256 * 640 / (4 * 3 * 128 * 128 * 8 / 7)),
    ],
)
def test_use_of_tiles_and_waves_by_hand(shape: tuple[int, int, int], use: float) -> None:
    m, n, k = shape
    assert 2e-12 * m * n * k / seconds(product(m, n, k)) == pytest.approx(use, rel=1e-6)


def test_attention_runs_in_tiles_of_128_queries_and_keys() -> None:
    # 2 x 197 queries are 4 tiles of 128 rows, one wave; 256 key steps and 100 of latency against 197.
    expected = 2 * 197 * 197 / (4 * 128 * 356)
    work = product(197, 197, 64, batch=2, kind="attention")
    assert work.flops[0] / 1e12 / seconds(work) == pytest.approx(expected, rel=1e-6)


def test_the_working_set_decides_the_bandwidth() -> None:
    assert 1e5 / seconds(stream(1e5)) == pytest.approx(1e12, rel=0.02)
    assert 1e8 / seconds(stream(1e8)) == pytest.approx(1e11, rel=0.001)
    at_the_edge = 1.0 / (0.5 / 1e12 + 0.5 / 1e11)  # half of the bytes hit
    assert 1e6 / seconds(stream(1e6)) == pytest.approx(at_the_edge, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "read", "written", "expected"),
    [
        ("aten.convolution", "conv", (32, 100, 1, 9), 1e4, 1e4, "depthwise"),
        (
            "aten.convolution",
            "conv",
            (1, 100, 32, 16),
            4 * (100 * 16 + 32 * 16),
            1e4,
            "conv1x1",
        ),  # reads m k and n k elements
        (
            "aten.convolution",
            "conv",
            (1, 100, 32, 144),
            4 * (100 * 16 + 32 * 144),
            1e4,
            "conv",
        ),  # 3 x 3: an input of m k / 9
        (
            "aten.convolution",
            "conv",
            (1, 25, 32, 16),
            4 * (100 * 16 + 32 * 16),
            1e4,
            "conv",
        ),  # stride 2: an input of 4 m k
        ("aten.convolution", "conv", (1, 100, 32, 27), 1e4, 1e4, "stem"),  # three channels
        (
            "aten.convolution",
            "conv",
            (1, 98, 32, 16, 49),
            4 * (98 * 16 + 32 * 16),
            1e4,
            "conv1x1_odd",
        ),  # pictures of 196 bytes
        ("aten.convolution", "conv", (1, 98, 32, 16, 196), 4 * (98 * 16 + 32 * 16), 1e4, "conv1x1"),  # of 784
        ("aten.native_batch_norm", "vector", (1, 10, 1, 49), 1e4, 1e4, "batch_norm"),
        ("aten.native_layer_norm", "vector", (1, 10, 1, 64), 1e4, 1e4, "layer_norm"),
        ("aten._softmax", "vector", (1, 10, 1, 64), 1e4, 1e4, "softmax"),
        ("aten.mean", "vector", (1, 10, 1, 64), 1e4, 1e2, "reduction"),
        ("aten._adaptive_avg_pool2d", "vector", (), 1e4, 1e2, "reduction"),
        ("aten.max_pool2d_with_indices", "vector", (), 1e4, 1e4, "pool"),
        ("aten.gelu", "vector", (), 1e4, 1e4, "special"),
        ("aten.elu", "vector", (), 1e4, 1e4, "special"),
        ("aten.relu_", "vector", (), 1e4, 1e4, "pointwise"),
        ("aten.leaky_relu", "vector", (), 1e4, 1e4, "pointwise"),
        ("aten.hardswish_", "vector", (), 1e4, 1e4, "pointwise"),
        ("aten.hardsigmoid", "vector", (), 1e4, 1e4, "pointwise"),
        ("aten.add", "vector", (), 2e4, 1e4, "pointwise"),
        ("aten.mul", "vector", (), 1e4, 1e4, "pointwise"),  # by a number
        ("aten.mul", "vector", (), 1.1e4, 1e4, "broadcast"),  # by one number for each channel
        ("aten.maximum", "vector", (), 2e4, 1e4, "pointwise"),
        ("aten.index", "gather", (1, 10, 1, 64), 1e4, 1e4, "gather_rows"),  # rows of 256 bytes
        ("aten.index", "gather", (1, 10, 1, 2), 1e4, 1e4, "gather"),  # of 8
        ("aten.searchsorted", "gather", (), 1e4, 1e4, "gather"),
        ("aten.sort", "gather", (), 1e4, 1e4, "sort"),
        ("aten.topk", "gather", (), 1e4, 1e4, "topk"),
        ("aten.index_put_", "gather", (), 1e4, 1e4, "scatter"),
        ("aten.scatter_add", "gather", (), 1e4, 1e4, "scatter"),
        ("aten.cat", "copy", (), 1e4, 1e4, "copy"),
        ("aten.clone", "copy", (), 1e4, 1e4, "strided"),
    ],
)
def test_classes(name: str, kind: str, shape: tuple[int, ...], read: float, written: float, expected: str) -> None:
    row = WorkloadArrays(
        name=(name,), dtype=("float32",), flops=np.zeros(1), vector_ops=np.zeros(1), bytes_read=np.array([read]),
        bytes_written=np.array([written]), count=np.ones(1, dtype=np.int64), kind=(kind,), shape=(shape,),
    )  # fmt: skip
    assert operator_classes(row) == (expected,)


def test_short_rows_of_a_softmax_use_less_of_the_bandwidth() -> None:
    rows = replace(stream(1e8), name=("aten._softmax",), shape=((1, 1000, 1, 300),))
    assert 1e8 / seconds(rows) == pytest.approx(0.5e11, rel=0.01)  # k = k_half


def test_a_row_of_a_normalisation_costs_what_k_half_elements_cost() -> None:
    rows = replace(
        stream(1e6), name=("aten.native_layer_norm",), vector_ops=np.array([8e9]), shape=((1, 1000, 1, 100),)
    )
    assert seconds(rows) == pytest.approx(8e9 / 1e12 * (100 + 300) / 100, rel=1e-6)
    assert seconds(replace(rows, vector_ops=np.ones(1))) == pytest.approx(
        seconds(stream(1e6)), rel=1e-6
    )  # traffic is as fast as any


def test_what_is_not_hidden_adds_to_the_longer() -> None:
    data = board()
    data["calibration"]["operators"]["matmul"]["fp32"]["serial"] = fig(0.25, "ratio")
    work = replace(product(256, 512, 900), bytes_written=np.array([1e7]))
    computing, moving = seconds(replace(work, bytes_written=np.ones(1))), 1e7 / 1e11
    assert seconds(work, data) == pytest.approx(max(computing, moving) + 0.25 * min(computing, moving), rel=0.01)


def test_a_class_that_was_not_calibrated_is_an_error() -> None:
    with pytest.raises(
        UserError,
        match="not calibrated for operators of class conv1x1: it has matmul, attention, pointwise, layer_norm, softmax",
    ):
        seconds(replace(product(64, 64, 64, kind="conv"), bytes_read=np.array([4.0 * 2 * 64 * 64])))
    with pytest.raises(UserError, match="not calibrated for matmul in bf16: it has fp32"):
        seconds(replace(product(64, 64, 64), dtype=("bfloat16",)))


RATES = (
    "peak.fp32", "memory.dram.bandwidth", "memory.l2.bandwidth", "memory.l2.size", "calibration.bandwidth_fraction",
    "calibration.operators.matmul.fp32.compute", "calibration.operators.pointwise.fp32.bandwidth",
    "calibration.operators.matmul.fp32.bandwidth",
)  # fmt: skip
COSTS = (
    "calibration.operators.matmul.fp32.overhead", "calibration.operators.matmul.fp32.k_half", "calibration.tile_half",
    "calibration.operators.pointwise.fp32.overhead",
)  # fmt: skip
sizes = st.integers(1, 5000)


@given(st.sampled_from(RATES + COSTS), sizes, sizes, sizes, st.floats(1e2, 1e9), st.floats(1.0, 10.0))
def test_no_better_figure_slows_and_no_worse_one_speeds_up(
    path: str, m: int, n: int, k: int, size: float, factor: float
) -> None:
    device = load_device(board())
    value = device.figure(path).value
    moved = (
        np.array([value / factor, value]) if device.figure(path).unit == "ratio" else np.array([value, value * factor])
    )
    for work in (product(m, n, k), stream(size)):
        low, high = cost_batch(work, DeviceBatch.varied(device, work, {path: moved}, energy="none")).latency_s
        if path in RATES:
            assert high <= low * (1 + 1e-12)
        else:
            assert high >= low * (1 - 1e-12)


@given(st.integers(1, 64), sizes, sizes, sizes, st.integers(0, 3), st.integers(1, 500))
def test_more_work_never_takes_less_time(batch: int, m: int, n: int, k: int, which: int, more: int) -> None:
    shape = [batch, m, n, k]
    larger = list(shape)
    larger[which] += more
    assert seconds(product(*larger[1:], batch=larger[0])) >= seconds(product(m, n, k, batch=batch)) * (1 - 1e-9)


@given(st.floats(1e2, 1e9), st.floats(1.0, 100.0))
def test_more_bytes_never_take_less_time(size: float, factor: float) -> None:
    assert seconds(stream(size * factor)) >= seconds(stream(size)) * (1 - 1e-9)


def test_rows_without_kinds_keep_the_three_figures() -> None:
    bare = WorkloadArrays.from_rows([{"name": "op", "dtype": "float32", "flops": 1e9, "bytes_read": 8.0}])
    found = cost(bare, load_device(board()), energy="none")
    assert found.latency_s == pytest.approx(1e9 / 0.5e12 + 1e-5)
    assert found.model_error_rel == 0.2  # the error of the three figures, not that of the laws
    assert cost(product(64, 64, 64), load_device(board()), energy="none").model_error_rel == 0.08
    assert cost(product(64, 64, 64), load_device(board()), achieved=Achieved(), energy="none").model_error_rel == 0.2


def test_a_device_file_without_its_fit_error_never_replicates() -> None:
    data = board()
    claim = Claim.model_validate(
        {
            "id": "speedup", "statement": "twice as fast as the other", "value": 2.0, "unit": "x", "source": "Tab. 1", "tag": "read",
            "evidence": "modelled", "relation": "equals", "tolerance": {"rel": 0.2, "reason": "for the purpose of the test"},
            "neutral": 1.0, "no_control": "a test of the judge alone",
        }
    )  # fmt: skip
    here = Situation("reduced", "board")

    def verdict() -> Verdict:
        error = cost(product(64, 64, 64), load_device(data), energy="none").model_error_rel
        return judge(claim, Measurement("speedup", 2.0, model_error_rel=error), here).verdict

    assert verdict() == Verdict.REPLICATED
    del data["calibration"]["fit_error_rel"]
    assert verdict() == Verdict.DIRECTION


def test_launches_by_hand() -> None:
    # Launches at 1, 2, 3; kernels of 5, 1, 1: 1-6, 6-7, 7-8. Then of 0.1 each: the last starts at 3.
    assert launched_latency_s(np.array([5.0, 1.0, 1.0]), np.ones(3)) == pytest.approx(8.0)
    assert launched_latency_s(np.full(3, 0.1), np.ones(3)) == pytest.approx(3.1)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=30))
def test_launches_against_a_queue_stepped_in_time(rows: list[tuple[float, float]]) -> None:
    end = launched = 0.0
    for kernel, launch in rows:
        launched += launch
        end = max(end, launched) + kernel
    kernels, launches = np.array(rows).T
    assert launched_latency_s(kernels, launches) == pytest.approx(end, abs=1e-9)


def test_whole_numbers_divide_by_a_law_of_their_own_where_there_is_one() -> None:
    numbers = replace(stream(1e6), name=("aten.remainder",), dtype=("int64",))
    assert operator_classes(numbers) == ("division",)
    assert operator_classes(replace(numbers, name=("aten.mul",))) == ("integer",)
    plain = seconds(replace(numbers, dtype=("float32",), name=("aten.mul",)))
    assert seconds(numbers) == pytest.approx(plain)  # not measured apart: elementwise work like any other
    data = board()
    data["calibration"]["operators"]["division"] = {
        "fp32": {"bandwidth": fig(0.25, "ratio"), "overhead": fig(1e-9, "s")}
    }
    assert seconds(numbers, data) == pytest.approx(4 * plain, rel=1e-6)
