"""The tables of a comparison as plain rows: what CSV, Markdown, the page and W&B are made from."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from shared.compare.changes import Change
from shared.compare.model import Cell, Comparison
from shared.report import format as fmt

Row = dict[str, Any]


def claim_rows(comparison: Comparison) -> list[Row]:
    """Papers x claims: the paper's number, ours, the interval, the verdict, and where it comes from; one row a condition."""
    return [_claim_row(cell) for cell in comparison.cells]


def device_rows(comparison: Comparison) -> list[Row]:
    """Claims x devices of the papers that were run on several devices: our number and its verdict in a column each."""
    tables = []
    for paper in comparison.papers:
        devices = paper_devices(comparison, paper)
        if len(devices) > 1:
            for claim, by_device in _by_device(comparison, paper).items():
                found = {device: short(by_device[device]) for device in devices if device in by_device}
                tables.append({"paper": paper, "claim": claim, **found})
    return tables


def paper_devices(comparison: Comparison, paper: str) -> list[str]:
    """The devices that a paper was run on."""
    return sorted({cell.device for cell in comparison.cells if cell.paper == paper})


def device_cells(comparison: Comparison, paper: str) -> dict[str, dict[str, Cell]]:
    """The cell that speaks for each claim on each device, of the claims that have a number on more than one."""
    return {claim: cells for claim, cells in _by_device(comparison, paper).items() if len(cells) > 1}


def change_rows(changes: Sequence[Change]) -> list[Row]:
    """Ours against earlier commits: what verdict changed and why."""
    return [
        {
            "paper": change.new.paper,
            "claim": change.new.claim,
            "device": change.new.device,
            "scale": change.new.scale,
            "from": change.old.verdict,
            "to": change.new.verdict,
            "why": change.why,
            "ours_before": fmt.ours(change.old.row),
            "ours": fmt.ours(change.new.row),
            "commit_before": change.old.commit,
            "commit": change.new.commit,
            "machine": change.new.machines[0],
        }
        for change in changes
    ]


def run_rows(comparison: Comparison) -> list[Row]:
    """The runs that were compared."""
    return [
        {
            "paper": run.paper,
            "device": run.device,
            "scale": run.scale,
            "seed": run.seed,
            "machine": run.machine,
            "commit": run.commit,
            "started": fmt.date(run.started or None),
            "seconds": run.document.get("seconds"),
            **fmt.counts(run.document),
        }
        for run in comparison.runs
    ]


def disagreement_rows(comparison: Comparison) -> list[Row]:
    """Runs that were kept apart, and why."""
    return [
        {
            "paper": item.paper,
            "device": item.device,
            "scale": item.scale,
            "why": item.reason,
            "claims": ", ".join(item.claims),
        }
        for item in comparison.disagreements
    ]


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header, numbers unrounded; lists as JSON."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()})
    return file.getvalue()


def short(cell: Cell) -> str:
    """Our number with the sign of its verdict; the verdict alone where there is no number."""
    glyph = fmt.GLYPHS.get(cell.verdict, "?")
    return f"{glyph} {fmt.ours(cell.row) if cell.row.get('value') is not None else cell.verdict}"


def where(cell: Cell) -> str:
    """The machines of a cell in a few words."""
    return cell.machines[0] + (f" and {len(cell.machines) - 1} more" if len(cell.machines) > 1 else "")


def _by_device(comparison: Comparison, paper: str) -> dict[str, dict[str, Cell]]:
    """Per claim and device the cell of the usual configuration, reduced scale before others."""
    table: dict[str, dict[str, Cell]] = {}
    for cell in sorted((cell for cell in comparison.cells if cell.paper == paper), key=comparison.rank):
        table.setdefault(cell.claim, {}).setdefault(cell.device, cell)
    return {claim: table[claim] for name, claim in comparison.best if name == paper}


def _claim_row(cell: Cell) -> Row:
    row = cell.row
    copied = ("unit", "value", "ci_low", "ci_high", "n_seeds")
    return {
        "paper": cell.paper,
        "claim": cell.claim,
        "kind": row.get("kind", "claim"),
        "statement": row.get("statement"),
        "source": row.get("source"),
        "evidence": row.get("evidence"),
        "device": cell.device,
        "scale": cell.scale,
        "stated": fmt.stated(row),
        "ours": fmt.ours(row),
        "verdict": cell.verdict,
        "reason": row.get("reason") or "",
        "suspicious": bool(row.get("suspicious")),
        "stated_value": fmt.stated_value(row),
        **{key: row.get(key) for key in copied},
        "machine": "; ".join(cell.machines),
        "commit": cell.commit,
        "seeds": ", ".join(map(str, cell.seeds)),
        "num_runs": len(cell.runs),
        "configuration": cell.variant,
        "merged": cell.note,
    }
