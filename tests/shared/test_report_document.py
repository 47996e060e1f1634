"""results.json: what is written, refused and read back; and the result document that all tests of the report use."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.errors import UserError
from shared.report.document import SCHEMA_VERSION, load_results, plain, write_atomic, write_json


def make_claim(ident: str, **changes: Any) -> dict[str, Any]:
    """A row as the runner makes it; every key is there."""
    row: dict[str, Any] = {
        "id": ident, "ref": "C1", "kind": "claim", "statement": f"Statement of {ident}", "source": "Tab. 4", "tag": "paper",
        "evidence": "modelled", "relation": "equals", "paper_value": 9.23, "stated_value": None, "value": 9.2344, "unit": "ratio",
        "ci_low": None, "ci_high": None, "n_seeds": 1, "values": [], "tolerance": {"rel": 0.005, "reason": "rounding of the table"},
        "neutral": 1.0, "verdict": "replicated", "reason": "", "suspicious": False, "conditions": {}, "control": None,
        "experiment": "fpga_latency", "seconds": 0.4, "from_cache": False, "note": "", "sensitivity": None,
    }  # fmt: skip
    return row | changes


def make_document(**changes: Any) -> dict[str, Any]:
    """A realistic result with all five verdicts, a control that passed, a suspicious row, nulls and a finding."""
    claims = [
        make_claim(
            "energy_vs_naive", statement="Expert reordering saves 9.23× the energy of the same FPGA without it",
            conditions={"dataset": "PASCAL-Context", "batch": 1}, note="18,456 expected misses of 30.8 µs under random routing",
            control={"set": "hardware.reorder=false", "means": "experts are fetched per token", "value": 1.0,
                     "verdict": "not replicated", "ok": True},
            sensitivity=[
                {"figure": "ddr.bandwidth", "nominal": 19.2, "unit": "GB/s", "low": 9.6, "high": 38.4,
                 "value_low": 16.4, "value_high": 5.6, "flip_factor": 0.98},
                {"figure": "compute.macs_per_cycle", "nominal": 1536, "unit": "", "low": 768, "high": 3072,
                 "value_low": 5.2, "value_high": 16.1, "flip_factor": None},
                {"figure": "clock", "nominal": 300, "unit": "MHz", "low": 250, "high": 350,
                 "value_low": 8.1, "value_high": 10.2, "flip_factor": 1.06},
            ],
        ),
        make_claim(
            "on_chip_memory", statement="On-chip memory falls 2.40× (11.610 → 4.840 MiB)", evidence="exact", paper_value=2.40,
            value=2.3988, tolerance={"abs": 0.005, "reason": "rounding"}, seconds=0.01, experiment="memory",
            control={"set": ["model.moe=false"], "means": "all experts resident", "value": 1.0, "verdict": "not replicated",
                     "ok": True},
        ),
        make_claim(
            "flops_cut_pascal", statement="88 % fewer FLOPs for one task than encoder-focused multi-task models",
            source="abstract", evidence="exact", relation="at_least", paper_value=88.0, value=67.8, unit="%",
            tolerance={"abs": 1.0, "reason": "stated as a round number"}, verdict="not replicated", neutral=0.0, experiment="flops",
            reason="67.8 % is outside 88 ± 1 %: the printed baselines are about 2.5× larger than the shapes in the code give",
            control={"set": "model.sparse=false", "means": "every expert runs", "value": -24.9, "verdict": "not replicated",
                     "ok": True},
        ),
        make_claim(
            "multi_gate_beats_single", statement="One router per task beats one shared router (Δ_m, <higher> is better & fair)",
            source="Tab. 1", evidence="trained", relation="at_least", paper_value=1.9, value=1.42, ci_low=0.31, ci_high=2.53,
            n_seeds=5, values=[0.4, 1.1, 1.5, 1.9, 2.2], unit="points", verdict="direction only", neutral=0.0,
            tolerance={"rel": 0.1, "reason": "spread over seeds"}, experiment="multi_task", seconds=214.0,
            reason="the interval excludes zero, but the size cannot be compared at this scale",
            control={"set": "model.router=shared", "means": "one router for all tasks", "value": 1.3, "verdict": "direction only",
                     "ok": False},
        ),
        make_claim(
            "frame_latency", statement="One frame takes 69.033 ms on the ZCU104", paper_value=0.069033, value=0.069002, unit="s",
            tolerance={"rel": 0.001, "reason": "rounding of cycles"}, from_cache=True,
        ),
        make_claim(
            "gpu_speed_up", statement="Grouped GEMM closes the gap to the dense model on a GPU", tag="[recalled]",
            source="Sec. 4.4", evidence="measured", relation="at_least", paper_value=1.5, value=41.0, ci_low=38.2, ci_high=43.9,
            verdict="direction only", suspicious=True, reason="41.0× is far better than 1.5×", experiment="gpu",
        ),
        make_claim(
            "gpu_energy", statement="Energy on the GPU falls with the number of experts", relation="ordering", paper_value=None,
            value=None, unit=None, verdict="not tested", reason="needs a CUDA device", evidence="measured", tolerance=None,
            seconds=None, experiment="gpu_energy",
        ),
        make_claim(
            "edge_accuracy", statement="Edge F-measure of 71.7 on PASCAL-Context", paper_value=[71.0, 72.4], relation="between",
            value=None, unit="%", verdict="error", reason="RuntimeError: shape mismatch in the edge head", evidence="trained",
            experiment="edges", seconds=3.2,
        ),
        make_claim(
            "recounted_flops", kind="finding", ref="F1", statement="An honest recount gives 72.0 %, not 88 %, against NDDR-CNN",
            paper_value=None, stated_value=72.0, value=72.04, unit="%", evidence="exact", source="recount", tag="derived",
            tolerance={"abs": 0.5, "reason": "rounding"}, experiment="flops",
        ),
    ]  # fmt: skip
    curve = [
        {"method": method, "experts": n, "slow_down": factor * n**power, "low": factor * n**power * 0.9,
         "high": factor * n**power * 1.1}
        for method, factor, power in (("per token", 1.1, 0.55), ("reordered", 1.0, 0.02))
        for n in (4, 8, 16, 32, 64, 128)
    ]  # fmt: skip
    stages = {"routing": (0.655, 0.655), "attention": (36.756, 36.756), "experts": (31.591, 600.0)}
    document: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "paper": "m3vit",
        "title": "M³ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning",
        "scale": "reduced",
        "device": "zcu104",
        "seed": 0,
        "config": {"model": {"num_experts": 16, "top_k": 4}, "hardware": {"reorder": True}, "claims": None},
        "environment": {
            "commit": "9f2c61e0b7a4d5", "dirty": True, "python": "3.11.7", "versions": {"torch": "2.14.1", "numpy": "2.4.6"},
            "cpu": "AMD EPYC 9R14", "num_cores": 2, "gpu": None, "platform": "Linux-6.1-x86_64",
        },
        "started": "2026-03-01T14:05:00+00:00",
        "seconds": 301.7,
        "claims": claims,
        "measurements": [
            {
                "experiment": "fpga_latency", "name": "stages", "title": "Where the time of one frame goes", "note": "ZCU104, batch 1",
                "rows": [
                    {"variant": variant, "stage": stage, "latency_ms": times[index]}
                    for index, variant in enumerate(("reordered", "per token"))
                    for stage, times in stages.items()
                ],
                "plot": {"kind": "stacked", "x": "variant", "y": "latency_ms", "series": "stage", "xlabel": "schedule",
                         "ylabel": "latency (ms)", "log_x": False, "log_y": False, "error": None, "hline": None},
            },
            {
                "experiment": "fpga_latency", "name": "experts", "title": "Slow-down over the dense model by number of experts",
                "rows": curve, "note": "",
                "plot": {"kind": "line", "x": "experts", "y": "slow_down", "series": "method", "xlabel": "experts N",
                         "ylabel": "latency ÷ dense", "log_x": True, "log_y": True, "error": ["low", "high"], "hline": 1.0},
            },
            {
                "experiment": "multi_task", "name": "delta", "title": "Gain over single-task models", "note": "five seeds",
                "rows": [
                    {"task": task, "model": model, "gain": gain, "half": 0.6}
                    for task, gains in {"semseg": (1.2, 0.4), "depth": (2.1, 1.3), "normals": (-0.4, -0.9)}.items()
                    for model, gain in zip(("multi gate", "single gate"), gains, strict=True)
                ],
                "plot": {"kind": "bar", "x": "task", "y": "gain", "series": "model", "xlabel": "", "ylabel": "Δ (points)",
                         "log_x": False, "log_y": False, "error": "half", "hline": 0.0},
            },
            {
                "experiment": "flops", "name": "macs", "title": "MACs for one task", "note": "", "rows": [
                    {"model": "Cross-Stitch networks (ResNet-18)", "gmac": 259.5, "source": "recount"},
                    {"model": "NDDR-CNN (ResNet-18)", "gmac": 298.0, "source": "recount"},
                    {"model": "MTL baseline", "gmac": 66.9, "source": None},
                    {"model": "M³ViT-small", "gmac": 83.54, "source": "recount"},
                ],
                "plot": {"kind": "bar", "x": "model", "y": "gmac", "series": None, "xlabel": "", "ylabel": "GMAC", "log_x": False,
                         "log_y": True, "error": None, "hline": None},
            },
            {
                "experiment": "routing", "name": "load", "title": "Tokens per expert", "note": "",
                "rows": [{"expert": n, "tokens": 200 + 37 * ((n * 7) % 16)} for n in range(16)],
                "plot": {"kind": "scatter", "x": "expert", "y": "tokens", "series": None, "xlabel": "expert", "ylabel": "tokens",
                         "log_x": False, "log_y": False, "error": None, "hline": 477.0},
            },
            {
                "experiment": "memory", "name": "buffers", "title": "On-chip buffers", "note": "", "plot": None,
                "rows": [{"buffer": "tokens", "size_bytes": 922368, "resident": True}, {"buffer": "experts", "size_bytes": None}],
            },
        ],
        "pictures": [
            {"experiment": "synthroom", "name": "room", "title": "A scene and its labels", "file": "pictures/room.png", "note": "seed 0"}
        ],
        "notes": ["cache entry multi_task-3f2a was corrupt: set aside and recomputed"],
    }  # fmt: skip
    return document | changes


def test_round_trip_keeps_values_and_orders_keys(tmp_path: Path) -> None:
    document = make_document()
    shuffled = dict(sorted(document.items(), reverse=True))
    shuffled["claims"] = [dict(sorted(claim.items())) for claim in document["claims"]]
    shuffled["config"] = {"hardware": {"reorder": True}, "claims": None, "model": {"top_k": 4, "num_experts": 16}}
    first, second = write_json(document, tmp_path / "a.json"), write_json(shuffled, tmp_path / "b.json")
    assert first.read_bytes() == second.read_bytes()
    assert load_results(first) == document
    keys = list(json.loads(first.read_text()))
    assert keys[:3] == ["schema_version", "paper", "title"]
    assert keys[-4:] == ["claims", "measurements", "pictures", "notes"]
    assert "M³ViT" in first.read_text(encoding="utf-8")  # readable, not \u escapes


def test_rows_of_a_measurement_keep_their_column_order(tmp_path: Path) -> None:
    rows = [{"zeta": 1, "alpha": 2}]
    document = make_document(
        measurements=[{"experiment": "e", "name": "n", "title": "t", "rows": rows, "plot": None, "note": ""}]
    )
    loaded = load_results(write_json(document, tmp_path / "results.json"))
    assert list(loaded["measurements"][0]["rows"][0]) == ["zeta", "alpha"]


def test_infinite_interval_ends_become_null_and_the_argument_is_left_alone(tmp_path: Path) -> None:
    document = make_document(claims=[make_claim("one_seed", ci_low=-math.inf, ci_high=math.inf)])
    loaded = load_results(write_json(document, tmp_path / "results.json"))
    assert loaded["claims"][0]["ci_low"] is None
    assert loaded["claims"][0]["ci_high"] is None
    assert document["claims"][0]["ci_high"] == math.inf


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"claims": [make_claim("a"), make_claim("b", value=math.nan)]}, r"claims\[1\]\.value"),
        ({"claims": [make_claim("a", ci_low=math.nan)]}, r"claims\[0\]\.ci_low"),
        ({"seconds": math.inf}, "seconds"),
        ({"config": {"model": {"rate": -math.inf}}}, r"config\.model\.rate"),
        ({"claims": [make_claim("a", note=Path("x"))]}, r"PosixPath in claims\[0\]\.note"),
        ({"config": {"table": {3: "three"}}}, r"key 3 in config\.table"),
        ({"notes": ["\ud800"]}, r"notes\[0\]"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_field(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match=field):
        write_json(make_document(**changes), path)
    assert not path.exists()


def test_scalars_of_numpy_are_numbers() -> None:
    claim = plain(make_document(claims=[make_claim("a", value=np.float32(1.5), n_seeds=np.int64(3))]))["claims"][0]
    assert (claim["value"], claim["n_seeds"]) == (1.5, 3)
    assert type(claim["n_seeds"]) is int
    with pytest.raises(UserError, match="ndarray"):
        plain(make_document(claims=[make_claim("a", values=np.zeros(3))]))


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(make_document(seed=1), path)

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(
        UserError, match=r"results\.json: No space left on device; free some space or choose another folder"
    ):
        write_json(make_document(seed=2), path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    assert load_results(path)["seed"] == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"file/results\.json: .*; make the folder writable or choose another folder with out=DIR"
    ):
        write_json(make_document(), tmp_path / "file" / "results.json")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(UserError, match=r"Read-only file system; make the folder writable"):
        write_json(make_document(), tmp_path / "results.json")


def test_write_atomic_makes_folders_and_keeps_the_mode(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "deep" / "er" / "x.txt", "one")
    path.chmod(0o640)
    write_atomic(path, "zwei – 2")
    assert path.read_text(encoding="utf-8") == "zwei – 2"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in path.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 1, "paper": "m3', "not valid JSON .* damaged"),
        ("[1, 2]", "is not a result"),
        ("{}", "has no schema_version"),
        ('{"schema_version": 2}', "has schema_version 2, this version reads 1"),
        ('{"schema_version": 1, "paper": "p", "scale": "smoke", "device": "d", "seed": "0"}', "'seed' must be a int"),
        ("\x00\x01", "not valid JSON"),
    ],
)
def test_load_results_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_results(path)
    assert str(path) in str(caught.value)


def test_load_results_of_no_file_and_of_an_unknown_verdict(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        load_results(tmp_path / "none.json")
    path = write_json(
        make_document(claims=[make_claim("a"), make_claim("b", verdict="maybe")]), tmp_path / "results.json"
    )
    with pytest.raises(
        UserError, match=r"claims\[1\] needs an id and a verdict that is one of: replicated, direction only"
    ):
        load_results(path)
