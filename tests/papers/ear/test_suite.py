"""The paper in the suite: claims and experiments fit, and the GPU module stays plain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from shared.runner.papers import load_paper

ROOT = Path(__file__).resolve().parents[3]


def test_claims_carry_no_invented_number() -> None:
    paper = load_paper("ear")
    assert not paper.claims_file.published
    for claim in paper.claims_file.claims:
        if claim.kind == "claim":
            assert claim.relation == "ordering" or claim.id == "encoder_fixed"
            assert claim.value is None or claim.value == 0.0
    refs = {claim.ref for claim in paper.claims_file.claims}
    assert {f"C{i}" for i in range(1, 14)} <= refs


def test_gpu_module_imports_nothing_of_the_runner() -> None:
    code = (
        "import sys, papers.ear.gpu\n"
        "bad = {'hydra', 'omegaconf', 'wandb', 'pydantic', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "print(sorted(bad))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_gpu_measurement_on_the_cpu_is_a_share() -> None:
    from papers.ear.gpu import measure_share

    found = measure_share(
        name="resnet18", dim=64, batch=1, image_size=32, device="cpu", rounds=6, min_round_s=0.0, exemplars=8
    )
    assert 0 < found["share_low"] <= found["share_percent"] <= found["share_high"]
    assert found["seconds"]["encoder"] < found["seconds"]["both"] * 1.5
