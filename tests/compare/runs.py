"""Finished runs for the tests of the comparison: folders with a results.json as the runner leaves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.claims import Claim
from shared.experiment import mean_interval
from tests.shared.test_report_document import make_claim, make_document

COMMIT = "a" * 40


def environment(**changes: Any) -> dict[str, Any]:
    """A machine and the code it ran."""
    made = {
        "commit": COMMIT,
        "dirty": False,
        "python": "3.11.7",
        "versions": {"torch": "2.14.1"},
        "cpu": "Laptop",
        "num_cores": 2,
        "gpu": None,
        "platform": "Linux x86_64",
    }
    return made | changes


def exact(ident: str = "memory", **changes: Any) -> dict[str, Any]:
    """A counted claim."""
    return make_claim(ident, evidence="exact", experiment="counts", **changes)


def trained(values: list[float], ident: str = "gain", **changes: Any) -> dict[str, Any]:
    """A trained claim with one value a seed, an ordering above zero."""
    mean, low, high = mean_interval(values)
    terms = {
        "evidence": "trained",
        "relation": "ordering",
        "paper_value": None,
        "tolerance": None,
        "neutral": 0.0,
        "unit": "points",
    }
    numbers = {"value": mean, "ci_low": low, "ci_high": high, "values": values, "n_seeds": len(values)}
    return make_claim(ident, experiment="training", **terms, **numbers) | changes


def todays(paper: str) -> Mapping[str, Claim]:
    """Today's claims, for pooled seeds to be judged by."""
    claim = Claim.model_validate(
        {
            "id": "gain",
            "statement": "Statement of gain",
            "value": None,
            "unit": "points",
            "source": "Tab. 4",
            "tag": "read",
            "evidence": "trained",
            "relation": "ordering",
            "neutral": 0.0,
            "no_control": "a claim of the tests",
        }
    )
    return {"gain": claim}


def write_run(folder: Path, claims: list[dict[str, Any]], *, minute: int = 0, **changes: Any) -> Path:
    """A run's folder; ``minute`` says when it started."""
    started = f"2026-03-{1 + minute // 1440:02d}T{minute // 60 % 24:02d}:{minute % 60:02d}:00+00:00"
    document = make_document(claims=claims, started=started, **{"environment": environment(), **changes})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
