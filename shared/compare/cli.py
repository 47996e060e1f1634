"""``python compare.py FOLDER...``: comparison tables over finished runs."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.text import Text

from shared.compare import markdown, page, tables
from shared.compare.changes import Change, changes
from shared.compare.load import load_runs
from shared.compare.merge import compare
from shared.compare.model import Comparison
from shared.errors import UserError, unknown
from shared.report import format as fmt
from shared.report.document import write_atomic
from shared.report.terminal import STYLES, emit

HELP = """\
Compare finished runs, of this machine and of others.

  python compare.py FOLDER...                      any number of folders (or results.json files), searched at any depth
  python compare.py outputs/ results/ out=FOLDER   where the tables go; the default is outputs/comparison
  python compare.py outputs/ tracking=wandb        W&B online; the default logs offline, none not at all

Writes comparison.html (sorts and filters, needs no network), comparison.md, claims.csv, devices.csv, changes.csv and a W&B table.
Runs are put together only where paper, claim, scale, device, commit and configuration agree; what was kept apart is listed.

Status 0: everything was read. 1: a file was skipped, and named. 2: bad input.
"""
TITLE = "Comparison of runs"
_MANY = 12  # changes that are printed; the files have all
_TRACKING = {"none": "none", "offline": "offline", "wandb": "online"}


@dataclass(frozen=True)
class Arguments:
    """What was asked for."""

    places: tuple[str, ...]
    out: Path = Path("outputs/comparison")
    tracking: str = "offline"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of ``compare.py``; exits with the status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or {"-h", "--help"}.intersection(argv):
        print(HELP, end="")
        sys.exit(0 if argv else 2)
    try:
        sys.exit(run(read_arguments(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def read_arguments(argv: Sequence[str]) -> Arguments:
    """Folders and ``key=value`` pairs, as ``run.py`` has them.

    Raises:
        UserError: an unknown key or value, or no folder.
    """
    keys: dict[str, str] = {}
    places = []
    for argument in argv:
        match = re.fullmatch(r"([a-z_]+)=(.*)", argument)
        if match and not Path(argument).exists():
            keys[match[1]] = match[2]
        elif argument.startswith("-"):
            raise UserError(f"there is no option {argument}; python compare.py --help shows what there is")
        else:
            places.append(argument)
    for key in keys:
        if key not in ("out", "tracking"):
            raise unknown("key", key, ("out", "tracking"))
    tracking = keys.get("tracking", "offline")
    if tracking not in _TRACKING:
        raise unknown("tracking", tracking, _TRACKING)
    if not places:
        raise UserError("no folder of finished runs was given, such as outputs/")
    return Arguments(tuple(places), Path(keys.get("out") or Arguments.out), tracking)


def run(asked: Arguments) -> int:
    """Compare, write everything into the output folder, print a summary and return the status."""
    gc.disable()  # a thousand documents are millions of objects, none of which becomes garbage
    runs, problems = load_runs(asked.places)
    comparison = compare(runs, problems)
    found = changes(comparison)
    write(comparison, found, asked.out)
    console = Console()
    for line in summary(comparison, found):
        emit(console, line)
    if runs and asked.tracking != "none":
        from shared.report.tracking import log_comparison

        warning = log_comparison(
            wandb_tables(comparison, found), wandb_facts(comparison), asked.out, _TRACKING[asked.tracking]
        )
        if warning:
            emit(console, Text(f"note: {warning}"))
    for problem in problems:
        print(f"skipped: {problem.sentence}", file=sys.stderr)
    print(asked.out / "comparison.html")
    return 1 if problems else 0


def write(comparison: Comparison, found: Sequence[Change], folder: Path) -> None:
    """Write the page, the Markdown and the CSV files.

    Raises:
        UserError: the folder cannot be written.
    """
    html = page.render(comparison, found, folder, title=TITLE, made_by="python compare.py")
    write_atomic(folder / "comparison.html", html)
    write_atomic(folder / "comparison.md", markdown.render(comparison, found, title=TITLE))
    files = {
        "claims": tables.claim_rows(comparison),
        "devices": tables.device_rows(comparison),
        "changes": tables.change_rows(found),
    }
    for name, rows in files.items():
        write_atomic(folder / f"{name}.csv", tables.csv_text(rows))


def summary(comparison: Comparison, found: Sequence[Change]) -> list[Text]:
    """A line a paper, the changed verdicts and what was kept apart."""
    lines = [
        Text(f"{len(comparison.runs)} runs of {len(comparison.papers)} papers, {len(comparison.cells)} rows", "bold")
    ]
    width = max(map(len, comparison.papers), default=0)
    for paper in comparison.papers:
        line = Text(f"{paper:<{width}} ")
        counts = fmt.counts({"claims": [cell.row for (name, _), cell in comparison.best.items() if name == paper]})
        for verdict, count in counts.items():
            line.append(f" {fmt.GLYPHS[verdict]} {count} {verdict}", STYLES[verdict])
        lines.append(line)
    for change in found[-_MANY:]:
        lines.append(
            Text(
                f"changed: {change.new.paper} {change.new.claim}: {change.old.verdict} → {change.new.verdict}: {change.why}"
            )
        )
    if len(found) > _MANY:
        lines.append(Text(f"and {len(found) - _MANY} earlier changes of verdicts"))
    for item in comparison.disagreements[:_MANY]:
        claims = f"{len(item.claims)} claim{'' if len(item.claims) == 1 else 's'}"
        lines.append(
            Text(f"kept apart: {item.paper} on {item.device}, {item.scale}, {claims}: {item.reason}", "yellow")
        )
    if len(comparison.disagreements) > _MANY:
        lines.append(Text(f"and {len(comparison.disagreements) - _MANY} more kept apart", "yellow"))
    return lines


def wandb_tables(comparison: Comparison, found: Sequence[Change]) -> Mapping[str, list[tables.Row]]:
    """The tables of the W&B run, by name."""
    return {
        "comparison": tables.claim_rows(comparison),
        "devices": tables.device_rows(comparison),
        "changes": tables.change_rows(found),
        "kept_apart": tables.disagreement_rows(comparison),
        "runs": tables.run_rows(comparison),
    }


def wandb_facts(comparison: Comparison) -> dict[str, object]:
    """What tells this comparison from others in W&B."""
    return {
        "papers": list(comparison.papers),
        "devices": sorted({run.device for run in comparison.runs}),
        "machines": sorted({run.machine for run in comparison.runs}),
        "commits": sorted({run.commit for run in comparison.runs}),
        "num_runs": len(comparison.runs),
        "verdicts": fmt.counts({"claims": [cell.row for cell in comparison.best.values()]}),
    }
