"""The comparison as Markdown: papers x claims, claims x devices, changed verdicts, what was kept apart, the runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shared.compare import tables
from shared.compare.changes import Change
from shared.compare.model import Cell, Comparison
from shared.report import format as fmt
from shared.report.markdown import claim_cells, escape, table


def render(comparison: Comparison, changes: Sequence[Change], *, title: str, links: bool = False) -> str:
    """The comparison as one Markdown text. ``links``: papers are links to their cards, for a page inside the repository."""
    return "\n".join(_lines(comparison, changes, title, links)) + "\n"


def change_line(change: Change) -> str:
    """One changed verdict as an item of a list."""
    old, new = (f"{fmt.GLYPHS.get(verdict, '?')} {verdict}" for verdict in (change.old.verdict, change.new.verdict))
    where = f"{change.new.device}, {change.new.scale}"
    return (
        f"- **{escape(change.new.paper)}** `{change.new.claim}` ({escape(where)}): {old} → {new}. {escape(change.why)}."
    )


def _lines(comparison: Comparison, changes: Sequence[Change], title: str, links: bool) -> Iterator[str]:
    runs = comparison.runs
    yield from (f"# {title}", "")
    yield f"{len(runs)} runs of {len(comparison.papers)} papers."
    for problem in comparison.problems:
        yield from ("", f"**Skipped:** {escape(problem.sentence)}")
    yield from ("", *table(["Paper", *fmt.VERDICTS], _scores(comparison, links), range(1, 1 + len(fmt.VERDICTS))))
    if changes:
        yield from ("", "## Changed verdicts", "", *map(change_line, changes))
    for paper, paper_title in comparison.papers.items():
        yield from ("", f"## {paper}: {escape(paper_title)}", "")
        head = ["Claim", "Paper", "Ours", "Evidence", "Verdict", "Device, scale", "Machine, commit"]
        yield from table(head, [_claim(cell) for cell in comparison.shown if cell.paper == paper], (1, 2))
        yield from _devices(comparison, paper)
    if comparison.disagreements:
        yield from ("", "## Kept apart", "")
        for item in comparison.disagreements:
            claims = ", ".join(f"`{claim}`" for claim in item.claims)
            yield f"- {escape(item.paper)} on {escape(item.device)} at scale {item.scale}: {escape(item.reason)} ({claims})"
    yield from ("", "## Runs", "")
    head = ["Paper", "Device", "Scale", "Seed", "Machine", "Commit", "Started", "Took"]
    yield from table(head, [_run(row) for row in tables.run_rows(comparison)], (3, 7))


def _scores(comparison: Comparison, links: bool) -> Iterator[list[str]]:
    for paper in comparison.papers:
        counts = fmt.counts({"claims": [cell.row for (name, _), cell in comparison.best.items() if name == paper]})
        name = f"[{paper}](../papers/{paper}/README.md)" if links else escape(paper)
        yield [name, *(str(counts.get(verdict, 0)) for verdict in fmt.VERDICTS)]


def _claim(cell: Cell) -> list[str]:
    cells = claim_cells(cell.row)
    if cell.variant:
        cells[0] += f"<br>{escape(cell.variant)}"
    commit = f"`{cell.commit}`" + (f"<br>{escape(cell.note)}" if cell.note else "")
    return [*cells, escape(f"{cell.device}, {cell.scale}"), f"{escape(tables.where(cell))}, {commit}"]


def _devices(comparison: Comparison, paper: str) -> Iterator[str]:
    cells = tables.device_cells(comparison, paper)
    if cells:
        devices = sorted({device for by_device in cells.values() for device in by_device})
        yield from ("", f"{paper} by device:", "")
        rows = (
            [f"`{claim}`", *(escape(tables.short(found[device])) if device in found else "" for device in devices)]
            for claim, found in cells.items()
        )
        yield from table(["Claim", *map(escape, devices)], rows, range(1, 1 + len(devices)))


def _run(row: tables.Row) -> list[str]:
    names = ("paper", "device", "scale", "seed", "machine", "commit", "started")
    return [*(escape(str(row[name])) for name in names), fmt.duration(row["seconds"])]
