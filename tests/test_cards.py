"""What people read first is made from results and claims, and is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.claims import load_claims
from shared.report.cards import ROOT, merged_document, sections
from shared.report.document import load_results
from shared.runner.papers import paper_names

RESULTS = sorted(path for name in paper_names() for path in (ROOT / "results" / name).glob("*.json"))


def test_generated_tables_are_up_to_date() -> None:
    for path, name, text in sections():
        content = path.read_text(encoding="utf-8")
        between = content.split(f"<!-- {name}:begin -->")[1].split(f"<!-- {name}:end -->")[0]
        assert between.strip() == text.strip(), f"{path.name}: run python -m shared.report.cards"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_committed_results_name_their_commit_and_todays_claims(path: Path) -> None:
    document = load_results(path)
    assert document["environment"]["commit"], "reference results name their commit"
    if document["environment"]["dirty"]:
        card = (ROOT / "papers" / document["paper"] / "README.md").read_text(encoding="utf-8")
        assert "with local changes" in card, "a run of code that was not committed says so below its table"
    claims = load_claims(ROOT / "papers" / document["paper"] / "claims.yaml").by_id()
    assert {row["id"] for row in document["claims"]} <= set(claims)


def test_the_run_without_options_gives_the_table(tmp_path: Path) -> None:
    """Not the one on the user's data nor the one of some claims, whatever their files are called."""
    document = json.loads((ROOT / "results" / "ear" / "xeon-2core-reduced.json").read_text(encoding="utf-8"))
    folder = tmp_path / "ear"
    folder.mkdir()
    for name, changed in [("a", {"data": {"root": "images"}}), ("b", {"claims": ["nas_tau"]}), ("c", {})]:
        copy = {**document, "config": {**document["config"], **changed}, "started": name}
        (folder / f"{name}.json").write_text(json.dumps(copy), encoding="utf-8")
    assert merged_document(folder)["started"] == "c"


@pytest.mark.parametrize("name", paper_names())
def test_every_paper_has_a_card_with_a_table(name: str) -> None:
    card = (ROOT / "papers" / name / "README.md").read_text(encoding="utf-8")
    assert "<!-- table:begin -->" in card
    if not list((ROOT / "results" / name).glob("*.json")):
        assert "No reference run" in card, "a card without committed results says so"
