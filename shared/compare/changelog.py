"""The change log's section of verdicts, made from two folders of results.

``python -m shared.compare.changelog OLD NEW`` rewrites the section ``verdicts`` of CHANGELOG.md. OLD and NEW are folders, or
revisions of the repository whose ``results`` are meant, such as ``v0.1.0 results``. With ``-`` as OLD there was nothing before.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

from shared.compare.changes import folder_changes
from shared.compare.leaderboard import RESULTS, reference
from shared.compare.load import load_runs
from shared.compare.markdown import change_line
from shared.compare.merge import compare
from shared.compare.model import Cell, Comparison
from shared.errors import UserError
from shared.report import format as fmt
from shared.report.markdown import escape, update_section
from shared.runner.paths import ROOT

CHANGELOG = ROOT / "CHANGELOG.md"
NOTHING = "-"


def verdict_section(old: Comparison | None, new: Comparison) -> str:
    """Changed verdicts with the reason, then what came and what went, as a Markdown list."""
    return "\n".join(_lines(old or compare([]), new)) or "No verdict changed."


def _lines(old: Comparison, new: Comparison) -> Iterator[str]:
    changed, came, went = folder_changes(old, new)
    yield from map(change_line, changed)
    for paper, cells in _by_paper(came).items():
        counts = fmt.counts({"claims": [cell.row for cell in cells]})
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        yield f"- **{escape(paper)}**{': newly checked' if paper in old.papers else ', new'}: {words}."
    for paper, cells in _by_paper(went).items():
        yield f"- **{escape(paper)}**: no longer checked: {', '.join(f'`{cell.claim}`' for cell in cells)}."


def _by_paper(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    papers: dict[str, list[Cell]] = {}
    for cell in cells:
        papers.setdefault(cell.paper, []).append(cell)
    return papers


def read(place: str, stack: ExitStack) -> Comparison | None:
    """The results of a folder or of a revision, as they were judged then; those of this checkout by today's claims; None for ``-``.

    Raises:
        UserError: neither a folder nor a revision with results, or a file that cannot be read.
    """
    if place == NOTHING:
        return None
    folder = (
        Path(place)
        if Path(place).is_dir()
        else _checkout(place, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    )
    if folder.resolve() == RESULTS:
        return reference(folder)
    runs, problems = load_runs([folder])
    if problems:
        raise UserError(problems[0].sentence)
    return compare(runs)


def _checkout(revision: str, folder: Path) -> Path:
    """The ``results`` of a revision, written below ``folder``."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, "results"]
    try:
        archive = subprocess.run(command, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise UserError(
            f"'{revision}' is neither a folder nor a revision of this repository that has results"
        ) from None
    with tarfile.open(fileobj=BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "results"


def main(arguments: Sequence[str]) -> int:
    """Rewrite the section; status 2 and one sentence for bad input."""
    if len(arguments) != 2:
        print(
            "usage: python -m shared.compare.changelog OLD NEW (folders or revisions; - for nothing)", file=sys.stderr
        )
        return 2
    try:
        with ExitStack() as stack:
            old, new = (read(place, stack) for place in arguments)
            if new is None:
                raise UserError("NEW must be a folder of results or a revision")
            changed = update_section(CHANGELOG, "verdicts", verdict_section(old, new))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("updated CHANGELOG.md" if changed else "CHANGELOG.md is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
