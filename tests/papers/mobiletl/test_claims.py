"""Every counted or modelled claim holds as stated, and fails with its control; the committed reference files carry what is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from papers.mobiletl import experiments
from shared.claims import Claim, load_claims
from shared.experiment import Experiment, Measurement, Table
from shared.judge import Situation, judge
from shared.verdict import Verdict

FOLDER = Path(experiments.__file__).resolve().parents[1]
CLAIMS = load_claims(FOLDER / "claims.yaml")
COUNTED = (
    "block",
    "derivative",
    "motivation",
    "flops",
    "calibrated_flops",
    "memory",
    "proxyless",
    "saved_tensors",
    "step_latency",
)


def _config(overrides: dict[str, Any]) -> Any:
    from shared.hardware.device import DEVICE_FOLDER

    config = OmegaConf.load(FOLDER / "conf" / "paper" / "mobiletl.yaml")
    config.device = OmegaConf.load(DEVICE_FOLDER / "raspberry_pi_4b.yaml")
    for key, value in overrides.items():
        OmegaConf.update(config, key, value, force_add=False)
    return config


def _entry(name: str) -> Experiment:
    entry: Experiment = getattr(experiments, name).__experiment__
    return entry


def _measured(name: str, overrides: dict[str, Any]) -> dict[str, Measurement]:
    context = SimpleNamespace(seed=0, seeds=(0, 1, 2), scale="reduced", threads=1)
    context.published = {key: entry.value for key, entry in CLAIMS.published.items()}
    results: Iterator[Any] = _entry(name).function(_config(overrides), context)  # type: ignore[arg-type]
    return {result.claim: result for result in results if isinstance(result, Measurement)}


def _verdict(claim: Claim, measurement: Measurement) -> Verdict:
    return judge(claim, measurement, Situation("reduced", "raspberry_pi_4b")).verdict


NOT_REPLICATED = {
    "proxyless_tinytl_b": Verdict.NOT_REPLICATED,
    "proxyless_tinytl_l": Verdict.NOT_REPLICATED,
    "flops_reduction": Verdict.DIRECTION,
    "modelled_over_five": Verdict.DIRECTION,  # no published error of the device model
    "modelled_over_all": Verdict.DIRECTION,
}


@pytest.mark.parametrize("name", COUNTED)
def test_counted_claims_and_their_controls(name: str) -> None:
    claims = CLAIMS.by_id()
    measured = _measured(name, {})
    assert set(measured) == set(_entry(name).claims)
    for claim_id, measurement in measured.items():
        claim = claims[claim_id]
        expected = Verdict.NOT_TESTED if claim.used_in_fit else NOT_REPLICATED.get(claim_id, Verdict.REPLICATED)
        assert _verdict(claim, measurement) is expected, claim_id
        if claim.control and not claim.used_in_fit:
            assert _verdict(claim, _measured(name, dict(claim.control.set))[claim_id]) is Verdict.NOT_REPLICATED, (
                claim_id
            )


@pytest.mark.parametrize(("name", "gpu"), [("reference_measurements", "H100"), ("reference_transfer", "H200")])
def test_committed_references_become_tables(name: str, gpu: str) -> None:
    tables = [result for result in _entry(name).function(None, None) if isinstance(result, Table)]  # type: ignore[arg-type]
    assert tables
    assert all(table.rows and gpu in table.note for table in tables)


def test_the_card_holds_the_accuracies_of_the_committed_transfer() -> None:
    from papers.mobiletl.cifar import accuracies

    result = json.loads((FOLDER / "reference" / "cifar10_h200_sxm.json").read_text())
    card = " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())
    ways = {
        "FT-All": ("ft_all", 0), "FT-5": ("ft_blocks", 5), "MobileTL-5": ("mobiletl", 5), "FT-3": ("ft_blocks", 3),
        "MobileTL-3": ("mobiletl", 3), "FT-1": ("ft_blocks", 1), "MobileTL-1": ("mobiletl", 1), "norms": ("norm", 0),
        "shifts": ("bias", 0), "TinyTL-RandomL+B": ("lite_bias", 0), "classifier alone": ("last", 0),
    }  # fmt: skip
    assert result["complete"]
    for label, way in ways.items():
        found = accuracies(result, *way, [0, 1, 2])
        assert f"{label} {sum(found) / 3:.1f}" in card, label


def test_committed_gpu_measurement_meets_its_bounds() -> None:
    """The figures that the card quotes: memory at batch 128, time as a graph and eager at batch 8."""
    result = json.loads((FOLDER / "reference" / "h100_sxm.json").read_text())
    rows = {entry["batch"]: entry["rows"] for entry in result["networks"] if entry["model"] == "mobilenetv3_small_100"}
    assert max(result["kernel_errors"].values()) < 1e-6
    assert max(result["block_errors"].values()) < 1e-5
    assert max(result["graph_errors"].values()) < 1e-5
    assert rows[8]["mobiletl"]["loop_over_ft_blocks"][2] < 1.0
    assert rows[8]["mobiletl"]["graph_over_ft_blocks"][2] < 1.0
    assert rows[128]["mobiletl"]["peak_bytes"] < 0.6 * rows[128]["ft_blocks"]["peak_bytes"]


def test_library_needs_no_torch_to_be_listed() -> None:
    import subprocess
    import sys

    code = "import sys, papers.mobiletl.experiments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1]).returncode == 0


def test_gpu_code_needs_no_hydra() -> None:
    import subprocess
    import sys

    block = "import sys; sys.modules.update(dict.fromkeys(('hydra', 'omegaconf', 'pydantic', 'wandb')));"
    code = f"{block} import papers.mobiletl.gpu, papers.mobiletl.cifar"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parents[1]).returncode == 0
