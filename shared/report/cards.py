"""Tables of the README and of the cards, made from the reference results in ``results/<paper>/*.json``.

``python -m shared.report.cards`` rewrites them; a test fails while they differ. The numbers are those of the runs, the verdicts those that
today's claims and rules give them. Where several runs of a paper are kept, the whole one at reduced scale on the paper's default data
gives the table, and another run fills in what that machine could not test.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shared.claims import load_claims
from shared.errors import UserError
from shared.report.document import load_results
from shared.report.format import commit, machine, ours
from shared.report.markdown import claim_cells, claims_markdown, escape, headlines_markdown, table, update_section
from shared.runner.document import rejudge

ROOT = Path(__file__).resolve().parents[2]
NOT_TESTED = "not tested"


def merged_document(folder: Path) -> dict[str, Any]:
    """The results of one paper as one document.

    Raises:
        UserError: the folder holds no run at reduced scale.
    """
    documents = list(_documents(folder).values())
    base = _default_run(folder, documents)
    newest = sorted(documents, key=lambda document: str(document.get("started")), reverse=True)
    others = sorted((d for d in newest if d is not base), key=lambda d: bool(d["environment"].get("dirty")))
    return {**base, "claims": [_best(row, others) for row in base["claims"]]}


def on_other_data(folder: Path) -> Iterator[str]:
    """Lines that hold the trained rows of runs on the user's data against those of the default run, where both tested them."""
    documents = _documents(folder)
    tested = [row for row in _default_run(folder, documents.values())["claims"] if row["verdict"] != NOT_TESTED]
    default = {row["id"]: row for row in tested if row["evidence"] == "trained"}
    for name, document in documents.items():
        rows = [row for row in document["claims"] if row["id"] in default and row["verdict"] != NOT_TESTED]
        if not _root(document) or not rows:
            continue
        where = f"`results/{folder.name}/{name}`, run on {escape(machine(document))} at commit {commit(document)}"
        yield from ("", f"The trained rows once more with `data.root` ({where}):", "")
        cells = (
            [f"`{row['id']}`", escape(ours(default[row["id"]])), escape(ours(row)), claim_cells(row)[-1]]
            for row in rows
        )
        yield from table(["Claim", "Default data", "These data", "Verdict there"], cells, numeric=(1, 2))


def _default_run(folder: Path, documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    reduced = [document for document in documents if document["scale"] == "reduced"]
    if not reduced:
        raise UserError(f"{folder} holds no results at scale=reduced; run the paper and copy its results.json there")
    return min(reduced, key=_departures)


def _documents(folder: Path) -> dict[str, dict[str, Any]]:
    claims = load_claims(ROOT / "papers" / folder.name / "claims.yaml").by_id()
    return {path.name: rejudge(load_results(path), claims) for path in sorted(folder.glob("*.json"))}


def _root(document: dict[str, Any]) -> str | None:
    root: str | None = (document["config"].get("data") or {}).get("root")
    return root


def _departures(document: dict[str, Any]) -> int:
    """Ways in which a run is not what the command without options gives."""
    return bool(_root(document)) + (document["config"].get("claims", "all") != "all")


def _best(row: dict[str, Any], others: list[dict[str, Any]]) -> dict[str, Any]:
    if row["verdict"] != NOT_TESTED:
        return row
    for document in others:
        for other in document["claims"]:
            if other["id"] == row["id"] and other["verdict"] != NOT_TESTED:
                where = f"scale={document['scale']}, {machine(document)}, commit {commit(document).replace('`', '')}"
                return {**other, "evidence": f"{other['evidence']} ({where})"}
    return row


def sections() -> Iterator[tuple[Path, str, str]]:
    """File, section and text of every generated table."""
    documents = []
    papers = (path for path in (ROOT / "results").iterdir() if (ROOT / "papers" / path.name / "claims.yaml").exists())
    for folder in sorted(papers):
        document = merged_document(folder)
        documents.append(document)
        yield (
            ROOT / "papers" / folder.name / "README.md",
            "table",
            "\n".join([claims_markdown(document), *on_other_data(folder)]),
        )
    yield ROOT / "README.md", "table", headlines_markdown(documents)


def main() -> None:
    """Rewrite every table that is out of date and say which."""
    for path, name, text in sections():
        if update_section(path, name, text):
            print(f"updated {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
