"""The package as the runner sees it: claims, experiments, the GPU script without a GPU, and what its imports cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_three_lines_of_the_card() -> None:
    """In a fresh process, as a user types them: names of functions must not be shadowed by modules of the same name."""
    card = (ROOT / "papers/zero_tprune/README.md").read_text()
    lines = card.split("```python")[1].split("```")[0]
    setup = "import timm, torch; model = timm.create_model('test_vit').eval(); state = list(model.state_dict())"
    after = "assert model(torch.randn(1, 3, 160, 160)).shape == (1, 1000); assert list(model.state_dict()) == state; pruner.remove()"
    done = python("-c", f"{setup}\n{lines}\n{after}")
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_schedule_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    from papers.zero_tprune.__main__ import main

    assert main(["deit_small_patch16_224", "--flops", "0.65"]) == 0
    shown = capsys.readouterr().out
    assert "196 -> 186" in shown
    assert "pruner = prune(model, Schedule((Layer(1, 1, 10, 30), Layer(3," in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["deit_small_patch16_224"], "give flops=SHARE or latency=SHARE"),
        (["swin_tiny_patch4_window7_224", "--flops", "0.6"], "not a plain timm VisionTransformer"),
        (["deit_small_patch16_224", "--flops", "0.1"], "cannot be reached"),
        (["deit_small_patch16_224", "--flops", "0.6", "--device", "h300"], "unknown device 'h300'"),
        (["deit_small_patch16_224", "--flops", "0.6", "--dtype", "fp7"], "unknown dtype 'fp7'"),
        (["deit_small_patch16_224", "--flops", "0.6", "--weights", "nowhere.pth"], "does not exist"),
    ],
)
def test_input_that_cannot_be_used(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from papers.zero_tprune.__main__ import main

    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
