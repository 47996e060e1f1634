"""The claims on a terminal: one line as each claim is settled, and the table at the end of a run.

Colour only repeats what a glyph and a word say. Where standard output is not a terminal everything is plain lines, one a claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from shared.report import format as fmt

STYLES = {
    "replicated": "bold green",
    "direction only": "bold yellow",
    "not replicated": "bold red",
    "not tested": "dim",
    "error": "bold magenta",
}
_MIN_WIDTH, _MAX_WIDTH = 80, 200
_VERDICT_WIDTH = max(map(len, fmt.VERDICTS)) + 2
_GAP = 2
_ASCII = str.maketrans(
    {
        "✓": "+",
        "↗": "~",
        "✗": "x",
        "○": "-",
        "–": "-",
        "−": "-",
        "—": "-",
        "×": "x",
        "≥": ">=",
        "≤": "<=",
        "±": "+/-",
        "µ": "u",
    }
    | {"†": "*", "⚠": "!", "…": "...", "·": "|", "─": "-", "↳": ">", "∞": "inf", "━": "=", "’": "'", "“": '"', "”": '"'}
)


def claim_line(row: Mapping[str, Any], label: str = "") -> Text:
    """One line for a claim that has just been settled: verdict, id, our number, the paper's, how it was obtained, flags.

    ``label``: which run it is of, where many are shown together.
    """
    line = Text(no_wrap=True, end="")
    line.append_text(_verdict(row))
    line.append(" " * (_VERDICT_WIDTH - line.cell_len + _GAP))
    if label:
        line.append(f"{label}  ", "dim")
    line.append(str(row["id"]), "bold")
    if row.get("value") is not None:
        line.append(f"  {fmt.ours(row)}")
    if fmt.stated_value(row) is not None:
        line.append(f"  ({_stated_word(row)} {_paper(row)})", "dim")
    if row.get("evidence"):
        line.append(f"  {row['evidence']}", "cyan")
    if row.get("from_cache") or row.get("seconds") is not None:
        line.append(f"  {'cached' if row.get('from_cache') else fmt.duration(row['seconds'])}", "dim")
    for text, style in _warnings(row):
        line.append(f"  {text}", style)
    if reason := _reason(row):
        line.append(f"  {reason}", "dim")
    return line


def summary_line(document: Mapping[str, Any], label: str = "") -> Text:
    """Counts per verdict, seconds and machine on one line."""
    line = Text(f"{label}: " if label else "")
    line.append_text(_counts_text(document))
    line.append(f"{fmt.duration(document.get('seconds'))} · {fmt.machine(document)}", "dim")
    return line


def sweep_lines(documents: Sequence[Mapping[str, Any]], missing: Sequence[str], seconds: float) -> Iterator[Text]:
    """The summary of a sweep: a heading, one line a paper with its verdicts and its time, the runs without a result, the total.

    ``missing``: names of runs that left no result; ``seconds``: how long the whole sweep took.
    """
    papers: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        papers.setdefault(str(document["paper"]), []).append(document)
    yield Text()
    yield Text("Summary of the sweep", "bold underline")
    width = max(map(len, papers), default=0)
    times = {paper: fmt.duration(sum(run.get("seconds") or 0.0 for run in runs)) for paper, runs in papers.items()}
    for paper, runs in papers.items():
        line = Text(f"{paper:<{width}}  ", "bold")
        line.append(f"{times[paper]:>{max(map(len, times.values()))}}", "not bold")
        line.append(f"  {_plural(len(runs), 'run')}  ", "not bold dim")
        rows = [row for run in runs for row in run["claims"]]
        line.append_text(_counts_text({"claims": rows}))
        line.right_crop(3)
        yield line
    for name in missing:
        yield Text(f"no result: {name}", STYLES["error"])
    total = f"{_plural(len(documents) + len(missing), 'run')} of {_plural(len(papers), 'paper')}"
    yield Text(f"{total} in {fmt.duration(seconds)}")


def _counts_text(document: Mapping[str, Any]) -> Text:
    """Verdicts of claims and of findings with their counts, each followed by a dot."""
    line = Text()
    for kind in ("claim", "finding"):
        found = fmt.counts(document, kind)
        if kind == "finding" and found:
            line.append("findings: ", "dim")
        for verdict, count in found.items():
            line.append(f"{fmt.GLYPHS[verdict]} {count} {verdict}", STYLES[verdict])
            line.append(" · ", "dim")
    return line


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def claims_table(document: Mapping[str, Any]) -> RenderableType:
    """The table of all claims and, below them, of the findings; it takes the width of the console, up to 200 columns."""
    return _ClaimsTable(document)


def print_results(document: Mapping[str, Any], console: Console | None = None) -> None:
    """The whole result: a table on a terminal, plain lines elsewhere; an encoding without the glyphs gets ASCII ones."""
    console = console or Console()
    if console.is_terminal:
        emit(console, claims_table(document))
        return
    for row in sorted(document.get("claims", []), key=lambda row: row.get("kind") == "finding"):
        emit(console, claim_line(row))
    for note in document.get("notes", []):
        emit(console, Text(f"note: {note}"))
    emit(console, summary_line(document))


def emit(console: Console, renderable: RenderableType) -> None:
    """Print without ever failing on the encoding; text is not wrapped where the output is not a terminal."""
    options: dict[str, Any] = {
        "highlight": False,
        "soft_wrap": not console.is_terminal and isinstance(renderable, Text),
    }
    if console.encoding.lower().startswith("utf"):
        console.print(renderable, **options)
        return
    with console.capture() as capture:
        console.print(renderable, **options)
    text = capture.get().translate(_ASCII)
    console.file.write(text.encode(console.encoding, "replace").decode(console.encoding))


@dataclass(frozen=True)
class _Column:
    title: str
    width: int
    right: bool = False


@dataclass(frozen=True)
class _ClaimsTable:
    """Rows of fixed columns with full-width lines between them, which a table of rich cannot have."""

    document: Mapping[str, Any]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(_MAX_WIDTH, options.max_width)
        rows = list(self.document.get("claims", []))
        scope = " · ".join(
            f"{key} {self.document[key]}" for key in ("device", "scale", "seed") if self.document.get(key) is not None
        )
        heading = Text(str(self.document.get("title") or self.document.get("paper") or ""), "bold")
        yield heading.append(f"  {scope}", "not bold dim")
        for kind, title in (("claim", "Claims of the paper"), ("finding", "Findings about the paper")):
            block = [row for row in rows if row.get("kind", "claim") == kind]
            if block and width < _MIN_WIDTH:
                yield from (Text(), Text(title, "bold underline"), *(_wrapped(claim_line(row)) for row in block))
            elif block:
                yield from _block(title, block, _columns(rows, kind, width), width)
        if any(fmt.is_recalled(row) for row in rows):
            yield Text("† the paper's figure is recalled, not read in the paper", "dim")
        for note in self.document.get("notes", []):
            yield Text(f"note: {note}", "dim")
        yield Rule(style="dim")
        yield summary_line(self.document)


def _columns(rows: list[Mapping[str, Any]], kind: str, width: int) -> list[_Column]:
    """Column widths for ``width``; the statement gets a column only where it keeps 40 characters."""
    ident = min(max(len(str(row["id"])) for row in rows), 32 if width >= 110 else 24)
    paper = max(5, *(len(_paper(row)) for row in rows))
    value = max(4, *(len(fmt.ours(row)) for row in rows))
    how = max(3, *(len(str(row.get("evidence") or "")) for row in rows))
    fixed = ident + how + _VERDICT_WIDTH + 4 * _GAP
    spare = width - fixed - paper - value - _GAP
    if spare < 0:  # long intervals give way first: they fold onto a second line
        value = max(14, value + spare + _GAP)
        paper = min(paper, max(8, width - fixed - value))
    columns = [_Column("id", ident)]
    if spare >= 40:
        columns.append(_Column("statement", spare))
    columns += [
        _Column("paper" if kind == "claim" else "stated", paper, right=True),
        _Column("ours", value, right=True),
        _Column("how", how),
        _Column("verdict", _VERDICT_WIDTH),
    ]
    return columns


def _block(title: str, rows: list[Mapping[str, Any]], columns: list[_Column], width: int) -> Iterator[RenderableType]:
    yield Text()
    yield Text(title, "bold underline")
    yield _line(columns, [Text(column.title, "dim") for column in columns])
    beside = columns[1].title == "statement"
    for row in rows:
        statement = Text(_one_line(row.get("statement")), overflow="ellipsis", no_wrap=True)
        cells = [Text(str(row["id"]), "bold"), *([statement] if beside else [])]
        cells += [Text(_paper(row)), Text(fmt.ours(row)), Text(str(row.get("evidence") or ""), "cyan"), _verdict(row)]
        yield _line(columns, cells)
        if not beside and statement.plain:
            statement.stylize("dim")
            statement.truncate(width - _GAP, overflow="ellipsis")
            yield Padding(statement, (0, 0, 0, _GAP))
        if reason := _reason(row):
            yield Padding(Text(f"↳ {reason}", "dim"), (0, 0, 0, _GAP))
        for text, style in _warnings(row):
            yield Padding(Text(text, style), (0, 0, 0, _GAP))


def _line(columns: list[_Column], cells: list[Text]) -> Table:
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    for column in columns:
        grid.add_column(width=column.width, overflow="fold", justify="right" if column.right else "left")
    grid.add_row(*cells)
    return grid


def _verdict(row: Mapping[str, Any]) -> Text:
    verdict = str(row.get("verdict"))
    return Text(f"{fmt.GLYPHS.get(verdict, '?')} {verdict}", STYLES.get(verdict, ""))


def _paper(row: Mapping[str, Any]) -> str:
    return fmt.stated(row) + ("†" if fmt.is_recalled(row) else "")


def _stated_word(row: Mapping[str, Any]) -> str:
    return "stated" if row.get("kind") == "finding" else "paper"


def _wrapped(line: Text) -> Text:
    line.no_wrap, line.end = False, "\n"
    return line


def _reason(row: Mapping[str, Any]) -> str:
    return _one_line(row.get("reason")) if row.get("verdict") != "replicated" else ""


def _one_line(text: object) -> str:
    return " ".join(str(text or "").split())


def _warnings(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if row.get("suspicious"):
        yield "⚠ suspicious: far better than the paper's number, look for a mistake first", "yellow"
    if (row.get("control") or {}).get("ok") is False:
        yield f"✗ control passed: {_one_line(fmt.control_text(row))}", "bold red"
