"""The comparison as one HTML page that opens from the disk, sorts and filters without a network, and links every claim to its run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared.compare import tables
from shared.compare.changes import Change
from shared.compare.load import Run, differences
from shared.compare.model import Cell, Comparison
from shared.report import format as fmt
from shared.report.html import assets, claim_view, table, templates, yaml_text


def render(comparison: Comparison, changes: Sequence[Change], folder: Path, *, title: str, made_by: str) -> str:
    """The page as text.

    Args:
        comparison: what is shown.
        changes: verdicts that changed.
        folder: where the page will lie; links to results are relative to it.
        title: the heading.
        made_by: the command that makes the page.
    """
    configurations = _configurations(comparison)
    runs = {run: f"run-{index}" for index, run in enumerate(comparison.runs, 1)}
    claims = [_claim(cell, anchor, runs) for cell, anchor in _anchors(comparison).items()]
    best = [{**cell.row, "verdict": cell.verdict} for cell in comparison.best.values()]
    stated = [row for row in best if row.get("kind", "claim") == "claim"]
    return (
        templates()
        .get_template("compare.html.j2")
        .render(
            title=title,
            made_by=made_by,
            facts=list(_facts(comparison)),
            lead=f"{fmt.counts({'claims': stated}).get('replicated', 0)} of {len(stated)} claims replicated",
            counts=fmt.counts({"claims": stated}),
            finding_counts=fmt.counts({"claims": [row for row in best if row.get("kind", "claim") != "claim"]}),
            papers=list(_papers(comparison)),
            claims=claims,
            options={
                name: sorted({row["facets"][name] for row in claims})
                for name in ("paper", "device", "evidence", "kind")
            },
            verdicts=fmt.counts({"claims": [{"verdict": row["verdict"]} for row in claims]}),
            devices=list(_devices(comparison)),
            changes=[_change(change, runs) for change in changes],
            disagreements=comparison.disagreements,
            problems=[problem.sentence for problem in comparison.problems],
            runs=[_run(run, anchor, configurations, folder) for run, anchor in runs.items()],
            configurations=list(dict.fromkeys(configurations.values())),
            **assets("report.js", "compare.js"),
        )
    )


def _anchors(comparison: Comparison) -> dict[Cell, str]:
    """An anchor for each row: paper and claim, and a number where a claim has several rows."""
    anchors: dict[Cell, str] = {}
    used: dict[str, int] = {}
    best = set(comparison.best.values())
    for cell in sorted(comparison.shown, key=lambda cell: cell not in best):
        name = f"{cell.paper}.{cell.claim}"
        used[name] = used.get(name, 0) + 1
        anchors[cell] = name if used[name] == 1 else f"{name}.{used[name]}"
    return {cell: anchors[cell] for cell in comparison.shown}


def _claim(cell: Cell, anchor: str, runs: Mapping[Run, str]) -> dict[str, Any]:
    """A row of the table of claims: that of a report, and where it comes from."""
    view = claim_view(cell.row)
    kind = str(cell.row.get("kind", "claim"))
    more = [
        ("Machine", "; ".join(cell.machines)),
        ("Commit", cell.commit),
        ("Seeds", ", ".join(map(str, cell.seeds)) if len(cell.seeds) > 1 else ""),
        ("Configuration", cell.variant),
        ("Merged", cell.note),
    ]
    facets = {
        "paper": cell.paper,
        "device": cell.device,
        "evidence": view["evidence"],
        "kind": kind,
        "verdict": cell.verdict,
    }
    return view | {
        "anchor": anchor,
        "paper": cell.paper,
        "facets": facets,
        "more": [*view["more"], *more],
        "variant": cell.variant,
        "finding": kind != "claim",
        "where": {
            "anchor": runs[cell.runs[-1]],
            "device": cell.device,
            "scale": cell.scale,
            "machine": tables.where(cell),
            "commit": cell.commit,
        },
    }


def _facts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    runs = comparison.runs
    yield "Papers", str(len(comparison.papers))
    yield "Runs", str(len(runs))
    yield "Devices", str(len({run.device for run in runs}))
    yield "Machines", "; ".join(_few(sorted({run.machine for run in runs})))
    yield "Commits", ", ".join(_few(list(dict.fromkeys(run.commit for run in runs))))
    yield "Newest run", fmt.date(runs[-1].started or None) if runs else fmt.MISSING


def _few(names: Sequence[str], many: int = 3) -> list[str]:
    return [*names[:many], *([f"{len(names) - many} more"] if len(names) > many else [])]


def _papers(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Each paper with the verdicts of its claims as a strip of signs that link to the rows."""
    anchors = _anchors(comparison)
    for name, title in comparison.papers.items():
        cells = [cell for (paper, _), cell in comparison.best.items() if paper == name]
        claims = [cell for cell in cells if cell.row.get("kind", "claim") == "claim"]
        counts = fmt.counts({"claims": [cell.row for cell in claims]})
        yield {
            "name": name,
            "title": title,
            "lead": f"{counts.get('replicated', 0)} of {len(claims)} claims replicated",
            "counts": counts,
            "claims": [_chip(cell, anchors[cell]) for cell in claims],
            "findings": [_chip(cell, anchors[cell]) for cell in cells if cell not in claims],
        }


def _chip(cell: Cell, anchor: str) -> dict[str, Any]:
    return {"anchor": anchor, "verdict": cell.verdict, "label": f"{cell.claim}: {cell.verdict}"}


def _devices(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """Claims x devices, a table for each paper that was run on several."""
    for paper in comparison.papers:
        cells = tables.device_cells(comparison, paper)
        if cells:
            devices = sorted({device for by_device in cells.values() for device in by_device})
            rows = [
                {
                    "claim": claim,
                    "stated": fmt.stated(next(iter(by_device.values())).row),
                    "cells": [_device_cell(by_device.get(device)) for device in devices],
                }
                for claim, by_device in cells.items()
            ]
            yield {"paper": paper, "devices": devices, "rows": rows}


def _device_cell(cell: Cell | None) -> dict[str, Any]:
    if cell is None:
        return {"verdict": None, "text": "", "sort": ""}
    value = cell.row.get("value")
    if value is None:
        return {"verdict": cell.verdict, "text": cell.verdict, "sort": ""}
    return {"verdict": cell.verdict, "text": fmt.ours(cell.row), "sort": repr(value)}


def _change(change: Change, runs: Mapping[Run, str]) -> dict[str, Any]:
    return {
        "paper": change.new.paper,
        "claim": change.new.claim,
        "condition": f"{change.new.device}, {change.new.scale}",
        "old": change.old.verdict,
        "new": change.new.verdict,
        "old_run": runs.get(change.old.runs[-1]),
        "new_run": runs.get(change.new.runs[-1]),
        "old_commit": change.old.commit,
        "new_commit": change.new.commit,
        "why": change.why,
    }


def _run(run: Run, anchor: str, configurations: Mapping[Run, Any], folder: Path) -> dict[str, Any]:
    report = run.path.with_name("report.html")
    document = run.document
    return {
        "anchor": anchor,
        "name": anchor.removeprefix("run-"),
        "paper": run.paper,
        "device": run.device,
        "scale": run.scale,
        "seed": run.seed,
        "machine": run.machine,
        "commit": run.commit,
        "started": fmt.date(run.started or None),
        "took": fmt.duration(document.get("seconds")),
        "seconds": document.get("seconds") or 0,
        "counts": fmt.counts(document),
        "configuration": configurations[run].anchor,
        "results": _link(run.path, folder),
        "report": _link(report, folder) if run.path.name == "results.json" and report.is_file() else "",
    }


def _link(path: Path, folder: Path) -> str:
    return quote(os.path.relpath(path, folder).replace(os.sep, "/"))


class _Configuration:
    """One configuration that runs had: whole for the first of a paper, as differences from it for the others."""

    def __init__(self, anchor: str, run: Run, usual: Run | None) -> None:
        self.anchor, self.paper = anchor, run.paper
        self.num_runs = 0
        self.text = yaml_text(run.config) if usual is None else ""
        moved = differences(usual.config, run.config) if usual else {}
        self.differences = table(
            [{"key": key, "usual": _text(here), "here": _text(there)} for key, (here, there) in moved.items()]
        )


def _text(value: Any) -> str:
    return fmt.MISSING if value is None else str(value)


def _configurations(comparison: Comparison) -> dict[Run, _Configuration]:
    known: dict[tuple[str, str], _Configuration] = {}
    usual: dict[str, Run] = {}
    found: dict[Run, _Configuration] = {}
    for run in reversed(comparison.runs):  # the newest run's configuration is written out
        key = (run.paper, run.configuration())
        if key not in known:
            known[key] = _Configuration(f"config-{len(known) + 1}", run, usual.get(run.paper))
            usual.setdefault(run.paper, run)
        known[key].num_runs += 1
        found[run] = known[key]
    return found
