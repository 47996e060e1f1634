"""The leaderboard of the reference results: ``results/README.md`` and ``results/leaderboard.html``, which opens from the disk.

``python -m shared.compare.leaderboard`` rewrites both; a test fails while they differ. The numbers are those of the runs, the
verdicts those that today's claims and rules give them, as in the cards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from shared.compare import markdown, page
from shared.compare.changes import changes
from shared.compare.load import Run, load_runs
from shared.compare.merge import compare, todays_claims
from shared.compare.model import Comparison
from shared.errors import UserError
from shared.report.document import write_atomic
from shared.runner.document import rejudge
from shared.runner.paths import ROOT

RESULTS = ROOT / "results"
TITLE = "Reference results"
COMMAND = "python -m shared.compare.leaderboard"
_INTRODUCTION = f"""
[leaderboard.html](leaderboard.html) is the same with filters, sorting and a link from each claim to its run: download it with this folder
and open it, it needs no network. Both are made from the JSON files here by `{COMMAND}`.
"""


def reference(folder: Path = RESULTS) -> Comparison:
    """The committed results, judged by today's claims.

    Raises:
        UserError: a file that cannot be read, or none at all.
    """
    runs, problems = load_runs([folder])
    if problems:
        raise UserError(problems[0].sentence)
    return compare([Run(run.path, rejudge(run.document, todays_claims(run.paper))) for run in runs])


def pages(folder: Path = RESULTS) -> Iterator[tuple[Path, str]]:
    """Path and text of each page."""
    comparison = reference(folder)
    found = changes(comparison)
    text = markdown.render(comparison, found, title=TITLE, links=True)
    heading, rest = text.split("\n", 1)
    yield folder / "README.md", heading + "\n" + _INTRODUCTION + rest
    yield folder / "leaderboard.html", page.render(comparison, found, folder, title=TITLE, made_by=COMMAND)


def main() -> int:
    """Rewrite the pages that are out of date and say which."""
    try:
        for path, text in pages():
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                write_atomic(path, text)
                print(f"updated {path.relative_to(ROOT)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
