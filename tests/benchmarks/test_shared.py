"""Hot paths of the shared layer: tracing a model, costing it on many devices, comparing many runs.

Ratios are measured in alternation inside one run and recorded in ``extra_info``; absolute times never decide anything.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from shared.compare.load import load_runs
from shared.compare.merge import compare
from shared.hardware import IDEAL, DeviceBatch, WorkloadArrays, cost, cost_batch, load_device
from shared.measure import measure
from shared.workload import meta_model, trace
from tests.shared.test_report_document import make_document

MODEL, SHAPE, DEVICES = "deit_small_patch16_224", (1, 3, 224, 224), 64


def test_tracing_against_fvcore(benchmark: Any) -> None:
    """Counting DeiT-S: ours on the meta device with bytes and types of every operator, the peer FLOPs alone with real weights."""
    peer = pytest.importorskip("fvcore.nn")
    ours, real, images = meta_model(timm.create_model, MODEL), timm.create_model(MODEL).eval(), torch.zeros(SHAPE)

    def count() -> int:
        analysis = peer.FlopCountAnalysis(real, images).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return int(analysis.total())

    def ours_counts() -> int:
        return trace(ours, images.to("meta")).macs

    timings = measure({"trace": ours_counts, "fvcore": count}, rounds=7, min_round_s=0.0, warmup=1)
    benchmark.extra_info["ratio: trace / fvcore"] = timings.ratio("trace", "fvcore").median
    benchmark.pedantic(ours_counts, rounds=3)


def test_many_devices_at_once(benchmark: Any) -> None:
    """One workload on many devices as arrays, against one device after the other."""
    arrays = WorkloadArrays.from_workload(
        trace(meta_model(timm.create_model, MODEL), torch.zeros(SHAPE, device="meta"))
    )
    devices = [load_device("h200_sxm_141gb")] * DEVICES
    batch = DeviceBatch.of(devices, arrays, achieved=IDEAL)

    def at_once() -> Any:
        return cost_batch(arrays, batch)

    def one_by_one() -> Any:
        return [cost(arrays, device, achieved=IDEAL) for device in devices]

    timings = measure({"at once": at_once, "one by one": one_by_one}, rounds=7, warmup=1)
    ratio = timings.ratio("at once", "one by one")
    benchmark.extra_info["ratio: at once / one by one"] = ratio.median
    benchmark(at_once)
    assert ratio.high < 1.0


def test_comparing_runs(benchmark: Any, tmp_path: Path) -> None:
    """Finding, checking and merging runs against parsing their JSON alone, the least that any comparison does."""
    paths = []
    for seed in range(60):
        document = make_document(seed=seed, started=f"2026-03-01T14:{seed:02d}:00+00:00")
        path = tmp_path / str(seed) / "results.json"
        path.parent.mkdir()
        path.write_text(json.dumps(document), encoding="utf-8")
        paths.append(path)

    def ours() -> Any:
        return compare(*load_runs([tmp_path]), claims=lambda paper: {})

    def parsing() -> Any:
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    timings = measure({"compare": ours, "parse": parsing}, rounds=7, warmup=1)
    benchmark.extra_info["ratio: compare / parse"] = timings.ratio("compare", "parse").median
    benchmark(ours)
