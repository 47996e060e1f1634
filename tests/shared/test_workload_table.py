"""The table: sums, groupings, the compressed form, arrays, JSON, text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from shared.hardware.arrays import WorkloadArrays
from shared.workload import KINDS, Held, Op, Workload, trace


def op(**changes: Any) -> Op:
    row = {"name": "aten.mm", "module": "a.b", "kind": "matmul", "phase": "forward", "dtype": "float32"}
    figures = {"flops": 10, "vector_ops": 2, "bytes_read": 30, "bytes_written": 4, "count": 1}
    return Op(**(row | figures | changes))


OPS = st.builds(
    op,
    name=st.sampled_from(["aten.mm", "aten.add"]),
    module=st.sampled_from(["", "a", "a.b", "a.c", "ab"]),
    kind=st.sampled_from(KINDS),
    phase=st.sampled_from(["forward", "backward"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    flops=st.integers(0, 3).map(lambda n: 2 * n),
    vector_ops=st.integers(0, 2),
    count=st.integers(1, 3),
)
WORKLOADS = st.builds(Workload, st.lists(OPS, max_size=12).map(tuple))


@given(a=WORKLOADS, b=WORKLOADS, times=st.integers(1, 5))
def test_sums_and_multiples(a: Workload, b: Workload, times: int) -> None:
    for figure in ("flops", "macs", "vector_ops", "bytes"):
        assert getattr(a + b, figure) == getattr(a, figure) + getattr(b, figure)
        assert getattr(a * times, figure) == getattr(times * a, figure) == times * getattr(a, figure)


@given(work=WORKLOADS, depth=st.integers(1, 3))
def test_every_grouping_and_the_compressed_form_keep_the_totals(work: Workload, depth: int) -> None:
    for groups in (work.by_kind(), work.by_phase(), work.by_op(), work.by_module(depth)):
        assert sum(totals.flops for totals in groups.values()) == work.flops
        assert sum(totals.bytes for totals in groups.values()) == work.bytes
        assert sum(totals.num_ops for totals in groups.values()) == work.totals.num_ops
    compressed = work.compressed()
    assert compressed.totals == work.totals
    assert compressed.by_kind() == work.by_kind()
    for dtype in ("float32", "bfloat16"):
        flops = [sum(row.flops * row.count for row in w.ops if row.dtype == dtype) for w in (work, compressed)]
        assert flops[0] == flops[1]
    assert compressed.compressed().ops == compressed.ops
    costs = [(row.name, row.kind, row.phase, row.dtype, row.flops, row.vector_ops) for row in compressed.ops]
    assert len(set(costs)) == len(costs)


@given(work=WORKLOADS)
def test_arrays_hold_the_rows(work: Workload) -> None:
    arrays = work.arrays()
    for figure in ("flops", "vector_ops", "bytes_read", "bytes_written"):
        assert arrays[figure].dtype == np.float64
        assert arrays[figure] @ arrays["count"] == getattr(work.totals, figure)
    assert [arrays["dtypes"][i] for i in arrays["dtype_id"]] == list(arrays["dtype"]) == [row.dtype for row in work.ops]
    assert arrays["kind"] == tuple(row.kind for row in work.ops)


def test_cost_models_take_the_rows() -> None:
    work = trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(2, 8)) * 3
    rows = WorkloadArrays.from_workload(work)
    assert rows.name == ("aten.addmm", "aten.relu")
    assert (rows.total("flops"), rows.total("bytes_moved")) == (work.flops, work.bytes)


def test_a_multiple_is_a_positive_integer() -> None:
    work = Workload((op(),))
    with pytest.raises(ValueError, match="0 times"):
        work * 0
    with pytest.raises(TypeError):
        work * 1.5  # type: ignore[operator]
    with pytest.raises(TypeError):
        work + 1  # type: ignore[operator]


def test_repeating_work_holds_its_memory_once_and_adding_parts_holds_both() -> None:
    part = Workload((op(),), (Held("w", 3, 12),), (Held("b", 1, 8),), (Held("", 5, 20),))
    assert [(part * 3).parameter_bytes, (part * 3).buffer_bytes, (part * 3).saved_bytes] == [12, 8, 20]
    both = part + part
    assert [both.num_parameters, both.parameter_bytes, both.buffer_bytes, both.saved_bytes] == [6, 24, 16, 40]


def test_merged_rows_keep_the_path_that_they_share() -> None:
    work = Workload((op(module="a.b.x"), op(module="a.c", count=2), op(module="a.b.y"), op(flops=12)))
    first, second = work.compressed().ops
    assert (first.module, first.count) == ("a", 4)
    assert (second.module, second.count) == ("a.b", 1)
    different = Workload((op(), op(dtype="bfloat16"), op(phase="backward"), op(bytes_read=31), op(name="aten.bmm")))
    assert different.compressed() == different


def test_within_does_not_take_names_that_only_begin_alike() -> None:
    work = Workload((op(module="a"), op(module="a.b"), op(module="ab")), (Held("a.w", 1, 4), Held("ab.w", 1, 4)))
    assert [row.module for row in work.within("a").ops] == ["a", "a.b"]
    assert work.within("a").num_parameters == 1
    assert work.within("") == work


def test_the_dict_is_json_and_the_table_prints() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    work = trace(model, torch.randn(2, 8), training=True)
    data = json.loads(json.dumps(work.to_dict()))
    assert (data["macs"], data["num_parameters"], data["saved_bytes"]) == (256, 144, work.saved_bytes)
    assert sum(row["flops"] * row["count"] for row in data["ops"]) == work.flops
    assert [row["count"] for row in data["ops"] if row["name"] == "aten.addmm"] == [2]
    text = str(work)
    assert "144 parameters" in text
    assert "total" in text
    console = Console(record=True, width=100)
    console.print(work.table("kind"), work)
    assert "matmul" in console.export_text()
    assert "3 calls" in repr(work)
