"""The claims table as Markdown, for the README and the result cards, and the section of a file that it replaces."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.report import format as fmt
from shared.report.document import write_atomic

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~$#&])")


def claims_markdown(document: Mapping[str, Any]) -> str:
    """The claims, and below them the findings, as Markdown tables with one line of reasons for what is not replicated."""
    return "\n".join(_lines(document))


def headlines_markdown(documents: Sequence[Mapping[str, Any]]) -> str:
    """The headline rows of many papers in one table."""
    rows = [
        [f"[{document['paper']}](papers/{document['paper']}/README.md)", *claim_cells(row)]
        for document in documents
        for row in document["claims"]
        if row.get("headline")
    ]
    return "\n".join(table(["Paper", "Claim", "Paper's number", "Ours", "Evidence", "Verdict"], rows, numeric=(2, 3)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = ()) -> Iterator[str]:
    """The lines of a table of cells that are Markdown already; the columns ``numeric`` stand to the right."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('--:' if index in numeric else ':--' for index in range(len(head)))} |"
    yield from (f"| {' | '.join(cells)} |" for cells in rows)


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line (a table cell cannot hold a line break)."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def update_section(path: Path | str, name: str, text: str) -> bool:
    """Replace what stands between ``<!-- name:begin -->`` and ``<!-- name:end -->`` in a file; whether the file changed.

    Raises :class:`UserError` where the file cannot be read, or does not have each marker once and in this order.
    """
    path = Path(path)
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    try:
        old = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} to update its section '{name}': {error}") from None
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise UserError(
            f"{path} needs the line '{begin}' once and after it '{end}' once, to say where the section goes"
        )
    if begin in text or end in text:
        raise UserError(f"the text for the section '{name}' of {path} holds a marker of that section itself")
    newline = "\r\n" if "\r\n" in old else "\n"
    body = newline.join(text.strip("\n").splitlines())
    new = old[: old.index(begin) + len(begin)] + newline + body + newline + old[old.index(end) :]
    if new == old:
        return False
    write_atomic(path, new)
    return True


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    rows = document.get("claims", [])
    blocks = [
        ("Paper", [row for row in rows if row.get("kind", "claim") == "claim"]),
        ("Stated", [row for row in rows if row.get("kind", "claim") != "claim"]),
    ]
    for column, block in blocks:
        if block:
            if column == "Stated":
                yield from ("", "Findings about the paper:", "")
            yield from table(["Claim", column, "Ours", "Evidence", "Verdict"], map(claim_cells, block), numeric=(1, 2))
    yield from _footnotes(document, rows)


def claim_cells(row: Mapping[str, Any]) -> list[str]:
    """Claim, the paper's number, ours, evidence and verdict of one row."""
    recalled = " †" if fmt.is_recalled(row) else ""
    verdict = f"{fmt.GLYPHS.get(row.get('verdict') or '', '?')} {row.get('verdict')}"
    if row.get("verdict") != "replicated" and row.get("reason"):
        verdict += f": {row['reason']}"
    if row.get("suspicious"):
        verdict += "; suspicious: far better than the paper's number"
    if (row.get("control") or {}).get("ok") is False:
        verdict += f"; CONTROL PASSED: {fmt.control_text(row)}"
    source = f" ({row['source']})" if row.get("source") else ""
    ident = re.sub(r"[`|\s]+", " ", str(row["id"]))
    return [
        f"`{ident}`<br>{escape(str(row.get('statement') or '') + source)}",
        escape(fmt.stated(row)) + recalled,
        escape(fmt.ours(row)),
        escape(str(row.get("evidence") or "")),
        escape(verdict),
    ]


def _footnotes(document: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if any(fmt.is_recalled(row) for row in rows):
        yield from ("", "† the paper's figure is recalled, not read in the paper.")
    scope = f"Device `{document.get('device')}`, scale `{document.get('scale')}`, seed {document.get('seed')}"
    yield from (
        "",
        f"{scope}; run on {escape(fmt.machine(document))} at commit {fmt.commit(document)} in {fmt.duration(document.get('seconds'))}.",
    )
