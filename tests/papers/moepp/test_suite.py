"""The package as the runner sees it: claims, experiments, the GPU scripts without a GPU, and what its imports cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.runner.papers import load_paper

ROOT = Path(__file__).parents[3]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_claim_is_settled_by_one_experiment() -> None:
    paper = load_paper("moepp")
    assert {claim.ref for claim in paper.claims_file.claims} == {f"C{index}" for index in range(1, 15)}


def test_measured_ranges_lie_between_the_printed_ratio_and_the_bound() -> None:
    from papers.moepp.experiments.rows import MODELS, ROWS, TAUS
    from papers.moepp.shape import SHAPES

    file = load_paper("moepp").claims_file
    claims, published = file.by_id(), file.published
    for model, tau in ROWS:
        value = claims[f"speedup_{model}_{tau}"].value
        assert isinstance(value, tuple)
        printed = published[f"expert_s_{model}_moe"].value / published[f"expert_s_{model}_{tau}"].value
        assert value == (
            pytest.approx(printed, abs=6e-4),
            pytest.approx(1 / SHAPES[MODELS[model]].rho(TAUS[tau]), abs=6e-4),
        )


def test_printed_throughputs() -> None:
    """+111.2, +25.2 and +27.8 % follow from the printed times."""
    p = load_paper("moepp").claims_file.published
    gains = [
        p[f"expert_s_{m}_moe"].value / p[f"expert_s_{m}_{t}"].value - 1
        for m, t in (("1b", "010"), ("06b", "075"), ("7b", "075"))
    ]
    assert gains == pytest.approx([1.1116, 0.2519, 0.2777], abs=1e-4)


def test_listing_the_experiments_imports_no_torch() -> None:
    done = python("-c", "import sys, papers.moepp.experiments; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_gpu_script_needs_neither_hydra_nor_pydantic(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    blocked = "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'pydantic', 'yaml')))"
    out = tmp_path / "gpu.json"
    arguments = ["--smoke", "--out", str(out), "--only", "check,peers,speedup", "--models", "1B", "--tokens", "256"]
    done = python("-c", f"{blocked}; from papers.moepp.gpu import main; main({arguments!r})", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(out.read_text())
    assert data["check"][0]["error"] < 1e-5
    assert data["check"][0]["same_bits"]
    assert {row["tau"] for row in data["speedup"]} == {None, 0.25}
    assert {row["name"] for row in data["peers"]} >= {"ours", "dense products"}
