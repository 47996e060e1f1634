"""The result document: what ``results.json`` holds, and what every report is made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from shared.claims import Claim
from shared.experiment import Artifact, Measurement, Picture, Table
from shared.judge import Situation, judge, model_interval
from shared.runner.environment import environment
from shared.runner.experiments import ExperimentRun

if TYPE_CHECKING:
    from shared.runner.execute import Run

SCHEMA_VERSION = 1


def build_document(run: Run, config: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a finished run. Pictures and artifacts are named here and written by :mod:`shared.runner.sinks`."""
    owner = {claim: experiment for experiment in run.experiments for claim in experiment.outcomes}
    reads = {entry.name: list(entry.config) for entry in run.paper.experiments}
    return {
        "schema_version": SCHEMA_VERSION,
        "paper": run.paper.name,
        "title": run.paper.claims_file.paper.title,
        "scale": run.settings.scale,
        "device": run.settings.device,
        "seed": run.settings.seed,
        "config": {key: value for key, value in config.items() if key not in ("out", "cache")},
        "environment": environment(),
        "started": run.started,
        "seconds": round(run.seconds, 3),
        "claims": [claim_row(run, claim, owner.get(claim.id)) for claim in run.claims],
        "experiments": [
            {
                "name": experiment.name,
                "seconds": round(experiment.total_seconds, 3),
                "from_cache": experiment.from_cache,
                "reads": reads[experiment.name],
            }
            for experiment in run.experiments
        ],
        "measurements": [
            {"experiment": experiment.name, **_table(exhibit)}
            for experiment in run.experiments
            for exhibit in experiment.exhibits
            if isinstance(exhibit, Table)
        ],
        "pictures": [
            {
                "experiment": experiment.name,
                "name": exhibit.name,
                "title": exhibit.title,
                "file": f"pictures/{exhibit.name}.png",
                "note": exhibit.note,
            }
            for experiment in run.experiments
            for exhibit in experiment.exhibits
            if isinstance(exhibit, Picture)
        ],
        "checkpoints": [
            f"checkpoints/{exhibit.name}"
            for experiment in run.experiments
            for exhibit in experiment.exhibits
            if isinstance(exhibit, Artifact)
        ],
        "notes": list(run.notes),
    }


def claim_row(run: Run, claim: Claim, experiment: ExperimentRun | None) -> dict[str, Any]:
    """One row of the claims table."""
    outcome = run.outcomes[claim.id]
    judgement = run.judgements[claim.id]
    number = outcome if isinstance(outcome, Measurement) else None
    low, high = (number.ci_low, number.ci_high) if number else (None, None)
    if number and claim.evidence == "modelled" and number.model_error_rel:
        low, high = model_interval(number)
    return {
        **_statement(claim),
        "value": _finite(number.value) if number else None,
        "ci_low": _finite(low),
        "ci_high": _finite(high),
        "n_seeds": number.n_seeds if number else 0,
        "values": list(number.values) if number else [],
        "model_error_rel": number.model_error_rel if number else None,
        "verdict": str(judgement.verdict),
        "reason": judgement.reason,
        "suspicious": judgement.suspicious,
        "control": run.controls.get(claim.id)
        or (
            {**claim.control.model_dump(), "value": None, "verdict": None, "reason": "", "ok": None}
            if claim.control
            else None
        ),
        "experiment": experiment.name if experiment else None,
        "seconds": round(experiment.seconds[claim.id], 3) if experiment else 0.0,
        "note": number.note if number else "",
        "sensitivity": run.sensitivity.get(claim.id),
    }


def _statement(claim: Claim) -> dict[str, Any]:
    """What claims.yaml says: the part of a row that no run changes."""
    stated = list(claim.value) if isinstance(claim.value, tuple) else claim.value
    return {
        "id": claim.id,
        "ref": claim.ref,
        "kind": claim.kind,
        "headline": claim.headline,
        "statement": claim.statement,
        "source": claim.source,
        "tag": claim.tag,
        "evidence": claim.evidence,
        "relation": claim.relation,
        "paper_value": stated if claim.kind == "claim" else None,
        "stated_value": stated if claim.kind == "finding" else None,
        "unit": claim.unit,
        "tolerance": claim.tolerance.model_dump(exclude_none=True) if claim.tolerance else None,
        "neutral": claim.neutral,
        "conditions": claim.conditions,
        "no_control": claim.no_control,
    }


def rejudge(document: Mapping[str, Any], claims: Mapping[str, Claim]) -> dict[str, Any]:
    """The document with the verdicts that today's claims and rules give its numbers; rows without a number keep theirs.

    Args:
        document: of any earlier run.
        claims: today's claims by id; a row whose claim is gone is left out.
    """
    situation = Situation(document["scale"], document["device"])
    rows = []
    for row in document["claims"]:
        claim = claims.get(row["id"])
        if claim is None:
            continue
        if row["value"] is not None:
            number = Measurement(
                row["id"],
                row["value"],
                row["ci_low"] if row["ci_low"] is not None or not row["values"] else -math.inf,
                row["ci_high"] if row["ci_high"] is not None or not row["values"] else math.inf,
                row["n_seeds"],
                tuple(row["values"]),
                row["model_error_rel"],
            )
            modelled = Measurement(row["id"], row["value"], model_error_rel=row["model_error_rel"])
            if claim.evidence == "modelled" and (number.ci_low, number.ci_high) == model_interval(modelled):
                number = modelled  # the interval is the model's error alone, not one of the experiment's own
            judgement = judge(claim, number, situation)
            row = {
                **row,
                **_statement(claim),
                "verdict": str(judgement.verdict),
                "reason": judgement.reason,
                "suspicious": judgement.suspicious,
            }
        rows.append(row)
    return {**document, "claims": rows}


def _table(table: Table) -> dict[str, Any]:
    rows = [
        {key: _finite(value) if isinstance(value, float) else value for key, value in row.items()} for row in table.rows
    ]
    return {**asdict(table), "rows": rows}


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: an open end of an interval is null."""
    return value if value is not None and math.isfinite(value) else None
