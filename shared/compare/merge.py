"""Merges what many runs say of each claim, and keeps apart what must not be merged.

Runs are put together only where paper, claim, scale, device, commit and the configuration that the claim depends on are the same:
- a ``trained`` claim: the seeds of the runs are pooled, the interval computed anew and the verdict judged again;
- any other claim: equal outcomes are one row; of repeated measurements on one machine the newest stands, with the range of all.
Everything else stays in rows of its own, and :class:`shared.compare.model.Disagreement` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from shared.claims import Claim, load_claims
from shared.compare.load import Problem, Run, differences
from shared.compare.model import Cell, Comparison, Disagreement
from shared.experiment import seed_measurement
from shared.report import format as fmt
from shared.runner.paths import PAPERS

_TERMS = ("paper_value", "stated_value", "relation", "unit", "tolerance", "neutral", "conditions")

Claims = Callable[[str], Mapping[str, Claim]]


def compare(runs: Sequence[Run], problems: Sequence[Problem] = (), claims: Claims | None = None) -> Comparison:
    """Merge runs.

    Args:
        runs: by when they started.
        problems: what could not be read.
        claims: today's claims of a paper, to judge pooled seeds by; those of this checkout if not given.
    """
    judge_by = functools.cache(claims or todays_claims)
    groups: dict[tuple[str, str, str, str, str, str], list[tuple[Run, Mapping[str, Any]]]] = {}
    for run in runs:
        keys: dict[str | None, str] = {}
        for row in run.document["claims"]:
            experiment = row.get("experiment")
            if experiment not in keys:
                keys[experiment] = run.configuration(experiment)
            scale = run.conditions(experiment)
            group = (run.paper, row["id"], scale, run.device, run.commit, keys[experiment])
            groups.setdefault(group, []).append((run, row))
    disagreements: dict[tuple[str, str, str, str], list[str]] = {}
    every = []
    for (paper, claim, scale, device, commit, configuration), seen in groups.items():
        cells = list(_merged(seen, commit, configuration, judge_by))
        every += cells
        numbers = {_outcome(cell.row) for cell in cells if cell.row.get("value") is not None}
        if len(numbers) > 1 and not _is_measured(cells):
            reason = f"commit {commit} gave different numbers for the same configuration; kept apart"
            disagreements.setdefault((paper, scale, device, reason), []).append(claim)
    current = _current(every)
    cells = _ordered(_joined(current, disagreements), runs)
    found = [Disagreement(*where, tuple(dict.fromkeys(ids))) for where, ids in sorted(disagreements.items())]
    return Comparison(tuple(runs), tuple(cells), tuple(every), tuple(found), tuple(problems))


def todays_claims(paper: str) -> Mapping[str, Claim]:
    """The claims of a paper of this checkout; none where it does not have the paper."""
    path = PAPERS / paper / "claims.yaml"
    return load_claims(path).by_id() if path.is_file() else {}


def _merged(
    seen: Sequence[tuple[Run, Mapping[str, Any]]], commit: str, configuration: str, claims: Claims
) -> Iterable[Cell]:
    """The cells of one claim in one configuration at one commit."""
    if len(seen) > 1 and (pooled := _pooled(seen, claims)) is not None:
        yield _cell([run for run, _ in seen], pooled, commit, configuration, f"{len(seen)} runs, seeds pooled")
        return
    by_machine: dict[str, list[tuple[Run, Mapping[str, Any]]]] = {}
    for run, row in seen:
        by_machine.setdefault(run.machine, []).append((run, row))
    if len(by_machine) > 1 and any(row.get("values") for _, row in seen):  # machines disagree, each may have its seeds
        for part in by_machine.values():
            yield from _merged(part, commit, configuration, claims)
        return
    by_outcome: dict[Any, list[tuple[Run, Mapping[str, Any]]]] = {}
    for run, row in seen:
        measured = row.get("evidence") == "measured" and row.get("value") is not None
        by_outcome.setdefault((run.machine, "measured") if measured else _outcome(row), []).append((run, row))
    for key, same in by_outcome.items():
        note = f"{len(same)} runs agree" if len(same) > 1 else ""
        values = [row["value"] for _, row in same if row.get("value") is not None]
        if key[1] == "measured" and min(values) != max(values):
            unit = same[-1][1].get("unit")
            note = f"newest of {len(same)} runs, {fmt.quantity(min(values), unit)} to {fmt.quantity(max(values), unit)}"
        yield _cell([run for run, _ in same], same[-1][1], commit, configuration, note)


def _cell(runs: Sequence[Run], row: Mapping[str, Any], commit: str, configuration: str, note: str) -> Cell:
    last = runs[-1]
    machines = tuple(dict.fromkeys(run.machine for run in runs))
    seeds = tuple(sorted({run.seed for run in runs}))
    scale = last.conditions(row.get("experiment"))
    return Cell(last.paper, row, scale, last.device, commit, configuration, machines, seeds, tuple(runs), note=note)


def _pooled(seen: Sequence[tuple[Run, Mapping[str, Any]]], claims: Claims) -> dict[str, Any] | None:
    """The row of a trained claim over the seeds of all runs; None where they must not be pooled.

    A base seed that was run again must have given the same numbers, each run must have trained as many seeds, and all must be judged
    by today's claim.
    """
    last_run, last = seen[-1]
    if any(row.get("evidence") != "trained" or not row.get("values") for _, row in seen):
        return None
    by_seed = {run.seed: row["values"] for run, row in seen}
    if any(by_seed[run.seed] != row["values"] for run, row in seen):
        return None
    if len(by_seed) < 2 or len({len(values) for values in by_seed.values()}) > 1:
        return None
    if any(row.get(term) != last.get(term) for _, row in seen for term in _TERMS):
        return None
    claim = claims(last_run.paper).get(last["id"])
    if claim is None:
        return None
    from shared.runner.document import rejudge

    number = seed_measurement(last["id"], [value for seed in sorted(by_seed) for value in by_seed[seed]])
    row = {
        "model_error_rel": None,
        **last,
        "value": number.value,
        "ci_low": number.ci_low,
        "ci_high": number.ci_high,
        "n_seeds": number.n_seeds,
        "values": list(number.values),
        "seconds": sum(row.get("seconds") or 0.0 for _, row in seen),
    }
    judged: dict[str, Any] = rejudge(
        {"scale": last_run.scale, "device": last_run.device, "claims": [row]}, {claim.id: claim}
    )["claims"][0]
    return judged if all(judged.get(term) == last.get(term) for term in _TERMS) else None


def _outcome(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two rows must share to say the same."""
    return row.get("value"), row.get("ci_low"), row.get("ci_high"), row["verdict"], row.get("reason")


def _is_measured(cells: Sequence[Cell]) -> bool:
    return all(cell.row.get("evidence") == "measured" for cell in cells)


def _current(every: Sequence[Cell]) -> list[Cell]:
    """The cells that no newer commit on the same machine supersedes."""
    newest: dict[tuple[Any, ...], tuple[str, str]] = {}
    for cell in every:
        for machine in cell.machines:
            key = (*cell.condition, machine)
            newest[key] = max(newest.get(key, ("", "")), (cell.started, cell.commit))
    return [
        cell for cell in every if any(newest[*cell.condition, machine][1] == cell.commit for machine in cell.machines)
    ]


def _joined(cells: Sequence[Cell], disagreements: dict[tuple[str, str, str, str], list[str]]) -> list[Cell]:
    """Equal outcomes of other machines, commits and configurations as one cell; different ones labelled and noted."""
    conditions: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        conditions.setdefault(cell.condition, []).append(cell)
    describe = functools.cache(_difference)
    result: list[Cell] = []
    for condition, members in conditions.items():
        joined: dict[Any, list[Cell]] = {}
        for cell in members:
            joined.setdefault(_outcome(cell.row), []).append(cell)
        kept = [_union(same) for same in joined.values()]
        configurations = {cell.configuration for cell in kept}
        if len(configurations) > 1:
            usual = _usual(kept)
            for index, cell in enumerate(kept):
                if cell.configuration != usual.configuration:
                    variant = describe(usual.runs[-1], cell.runs[-1], str(cell.row.get("experiment")))
                    kept[index] = replace(cell, variant=variant)
                    paper, claim, scale, device = condition
                    disagreements.setdefault(
                        (paper, scale, device, f"another configuration: {variant}; kept apart"), []
                    ).append(claim)
        commits = sorted({cell.commit for cell in kept if cell.row.get("evidence") == "trained"})
        if len(commits) > 1 and len(configurations) == 1:
            paper, claim, scale, device = condition
            reason = f"runs of different commits ({', '.join(commits)}) on different machines; kept apart"
            disagreements.setdefault((paper, scale, device, reason), []).append(claim)
        result += kept
    return result


def _union(same: Sequence[Cell]) -> Cell:
    """Cells of one outcome as one, the newest in front."""
    if len(same) == 1:
        return same[0]
    last = max(same, key=lambda cell: cell.started)
    runs = sorted({run for cell in same for run in cell.runs}, key=lambda run: (run.started, str(run.path)))
    machines = tuple(dict.fromkeys(machine for cell in [last, *same] for machine in cell.machines))
    seeds = tuple(sorted({run.seed for run in runs}))
    return replace(last, runs=tuple(runs), machines=machines, seeds=seeds, note=f"{len(runs)} runs agree")


def _usual(cells: Sequence[Cell]) -> Cell:
    """The configuration that most runs have, the newest of several."""
    return max(
        cells,
        key=lambda cell: (
            sum(len(other.runs) for other in cells if other.configuration == cell.configuration),
            cell.started,
        ),
    )


def _difference(usual: Run, other: Run, experiment: str) -> str:
    """How the configuration of ``other`` differs in what the experiment reads."""
    reads = other.reads.get(experiment)
    found = {
        key: values for key, values in _all_differences(usual, other).items() if not reads or key.split(".")[0] in reads
    }
    shown = [f"{key}={_short(there)} instead of {_short(here)}" for key, (here, there) in list(found.items())[:3]]
    return ", ".join(shown) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


@functools.cache
def _all_differences(usual: Run, other: Run) -> dict[str, tuple[Any, Any]]:
    return differences(usual.config, other.config)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _ordered(cells: Sequence[Cell], runs: Sequence[Run]) -> list[Cell]:
    """By paper, then as the paper's newest run lists its claims, then the usual configuration first."""
    places: dict[tuple[str, str], int] = {}
    for run in reversed(runs):
        for row in run.document["claims"]:
            places.setdefault((run.paper, row["id"]), len(places))
    return sorted(
        cells,
        key=lambda cell: (
            cell.paper,
            places[cell.paper, cell.claim],
            bool(cell.variant),
            cell.device,
            cell.scale,
            cell.machines,
        ),
    )
