"""What turns measurements into the claims' numbers."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from papers.switchnerf.experiments.measured import measurements
from papers.switchnerf.experiments.trained import _least_used
from papers.switchnerf.gpu import encode, main, render, train
from papers.switchnerf.gpu_bench import Bench, rays_per_s, speedups
from papers.switchnerf.pictures import flight, sheet
from shared.claims import load_claims
from shared.experiment import Measurement
from shared.measure import Timing, Timings

ROOT = Path(__file__).resolve().parents[3]


def test_every_claim_of_the_issue_is_there() -> None:
    claims = load_claims(ROOT / "papers" / "switchnerf" / "claims.yaml").claims
    refs = {claim.ref for claim in claims}
    assert refs == {f"H{i}" for i in range(1, 8)} | {f"B{i}" for i in range(1, 9)}


def test_idle_experts_count_as_unused() -> None:
    assert _least_used([0.5, 0.3, 0.2]) == 0.0  # the fourth expert saw nothing
    assert _least_used([0.4, 0.3, 0.2, 0.1]) == 0.1


SECONDS = {  # of one call
    "switch": 4.0, "switch compiled": 2.0, "switch captured": 2.5, "hmohe": 0.5, "hmohe captured": 0.2,
}  # fmt: skip


def _fake_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The GPU sections on tiny sizes, with invented timings: every code path but the clock."""
    bench = Bench(tmp_path / "o.json", smoke=True, claims_only=True)

    def timings(functions: dict[str, Any], rounds: int = 0, warmup: int = 0) -> Timings:
        by_name = {}
        for name in functions:
            s = SECONDS.get(name, 0.1 if name == "ours" else 3.0)
            by_name[name] = Timing(s, s, s, (s,) * 6)
        return Timings("card", by_name)

    monkeypatch.setattr(bench, "measure", timings)
    for section in (encode, render, train):
        section(bench)
    return bench.results


def test_speed_ups_point_the_right_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _fake_run(tmp_path, monkeypatch)
    assert "failed" not in result
    found = {m.claim: m for m in measurements(result, "hmohe", "ours") if isinstance(m, Measurement)}
    # A step takes the same rays in both networks: 2.0 s against 0.2 s. A rendering call takes 16 rays in 2.0 s against 32 in 0.2 s.
    assert found["gpu_train_speedup"].value == pytest.approx(10.0)
    assert found["gpu_render_speedup"].value == pytest.approx(20.0)
    assert found["gpu_encode_forward"].value == pytest.approx(30.0)
    assert found["gpu_encode_both"].value == pytest.approx(30.0)
    note = found["gpu_train_speedup"].note
    assert "'hmohe captured' against 'switch compiled'" in note
    # The claim says what the table beside it says.
    for claim, section in (("gpu_train_speedup", "train"), ("gpu_render_speedup", "render")):
        speed = result[section]["rays_per_s"]
        assert found[claim].value == pytest.approx(speed["hmohe captured"] / speed["switch compiled"])
    control = {m.claim: m.value for m in measurements(result, "switch", "reference") if isinstance(m, Measurement)}
    assert set(control.values()) == {1.0}


def test_a_form_that_fails_is_named_with_the_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Bench, "captured", broken)
    result = _fake_run(tmp_path, monkeypatch)
    found = {m.claim: m for m in measurements(result, "hmohe", "ours") if isinstance(m, Measurement)}
    assert found["gpu_train_speedup"].value == pytest.approx(4.0)  # 2.0 s against 0.5 s
    assert found["gpu_render_speedup"].value == pytest.approx(8.0)
    assert "failed: train: switch captured, train: hmohe captured" in found["gpu_train_speedup"].note


def test_intervals_turn_with_the_ratio() -> None:
    timings = Timings(
        "card",
        {"switch": Timing(2.0, 2.0, 2.0, (1.0, 2.0, 2.0, 2.0, 2.0, 4.0)), "hmohe": Timing(1.0, 1.0, 1.0, (1.0,) * 6)},
    )
    rays = {"switch": 10, "hmohe": 20}
    assert speedups(timings, rays)["hmohe/switch"] == pytest.approx([4.0, 2.0, 8.0])
    assert rays_per_s(timings, rays) == {"switch": 5.0, "hmohe": 20.0}


def test_every_section_of_the_gpu_script_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.json"
    arguments = ["gpu", "--smoke", "--out", str(out), "--city-budget-s", "0.2", "--city-arms", "hmohe,switch"]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert "Traceback" not in capsys.readouterr().err
    import json

    result = json.loads(out.read_text())
    assert {"check", "encode", "render", "train", "skew", "city"} <= set(result)
    assert set(result["city"]) == {"hmohe", "switch"}
    assert "failed" not in result
    assert all(row["forward_error"] < 1e-5 for row in result["check"])
    with Image.open(BytesIO(sheet(tmp_path / "city_hmohe.npz"))) as picture:
        assert picture.size == (2 * 32 + 64, 64)  # two columns of two views, and the expert map
    with Image.open(BytesIO(flight(tmp_path / "city_hmohe.npz", pixels=8))) as picture:
        assert picture.n_frames == 2  # type: ignore[attr-defined]
