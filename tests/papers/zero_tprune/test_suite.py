"""The package as the runner sees it: claims, experiments, the GPU script without a GPU, and what its imports cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from shared.runner.papers import load_paper

ROOT = Path(__file__).parents[3]


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_every_claim_is_settled_by_one_experiment() -> None:
    paper = load_paper("zero_tprune")
    refs = {ref for claim in paper.claims_file.claims for ref in [claim.ref] if ref}
    assert refs == {"C1", "C2", "C3", "C4", "C5", "C6", *(f"T{i}" for i in range(1, 9))}


def test_listing_the_experiments_imports_no_torch() -> None:
    done = python("-c", "import sys, papers.zero_tprune.experiments; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_gpu_script_needs_neither_hydra_nor_pydantic(tmp_path: Path) -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'pydantic', 'yaml')))"
    out = tmp_path / "gpu.json"
    run = f"{blocked}; from papers.zero_tprune.gpu import main; main(['--smoke', '--out', {str(out)!r}, '--only', 'check,stages,memory'])"
    done = python("-c", run)
    assert done.returncode == 0, done.stderr[-2000:]
    data = json.loads(out.read_text())
    assert {row["batch"] for row in data["stages"]} == {128, 256}
    assert set(data["stages"][0]["rows"]) >= {"random", "wpr", "wpr+eir", "wpr+eir+vhf", "full", "ceiling full"}
