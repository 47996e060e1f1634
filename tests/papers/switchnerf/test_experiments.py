"""What turns measurements into the claims' numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from papers.switchnerf.experiments.measured import measurements
from papers.switchnerf.experiments.trained import _least_used
from papers.switchnerf.gpu import main
from shared.claims import load_claims
from shared.experiment import Measurement

ROOT = Path(__file__).resolve().parents[3]


def test_every_claim_of_the_issue_is_there() -> None:
    claims = load_claims(ROOT / "papers" / "switchnerf" / "claims.yaml").claims
    refs = {claim.ref for claim in claims}
    assert refs == {f"H{i}" for i in range(1, 8)} | {f"B{i}" for i in range(1, 9)}


def test_idle_experts_count_as_unused() -> None:
    assert _least_used([0.5, 0.3, 0.2]) == 0.0  # the fourth expert saw nothing
    assert _least_used([0.4, 0.3, 0.2, 0.1]) == 0.1


def test_gpu_numbers_become_speed_ups() -> None:
    result = {
        "environment": {"gpu": "card"},
        "train": {
            "rays_per_s": {
                "switch": 9.0,
                "switch compiled": 10.0,
                "switch compiled with background": 11.0,
                "hmohe": 100.0,
            },
            "ratios": {"hmohe/switch compiled": [0.1, 0.08, 0.125]},  # time over time at equal rays
        },
        "render": {
            "rays_per_s": {"switch": 5.0, "switch compiled": 4.0, "hmohe": 100.0},
            "ratios": {"hmohe/switch": [20.0, 19.0, 21.0]},  # rays per second already
        },
        "encode": [
            {"what": what, "order": "camera rays", "speedup_of_ours": {"reference": [30.0, 29.0, 31.0]}}
            for what in ("forward", "forward and backward")
        ],
    }
    found = {m.claim: m for m in measurements(result, "hmohe", "ours") if isinstance(m, Measurement)}
    train = found["gpu_train_speedup"]
    assert (train.value, train.ci_low, train.ci_high) == pytest.approx((10.0, 8.0, 12.5))
    assert found["gpu_render_speedup"].value == 20.0
    control = {m.claim: m.value for m in measurements(result, "switch", "reference") if isinstance(m, Measurement)}
    assert set(control.values()) == {1.0}


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
    assert all(row["forward_error"] < 1e-5 for row in result["check"])
    assert (tmp_path / "city_hmohe.npz").exists()
