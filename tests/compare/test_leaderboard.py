"""The committed leaderboard is what its generator makes of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.compare import leaderboard
from shared.compare.leaderboard import RESULTS, pages, reference
from shared.errors import UserError
from shared.report.document import load_results
from shared.runner.papers import paper_names
from shared.runner.paths import ROOT
from tests.compare.runs import exact, write_run


def test_the_pages_are_up_to_date() -> None:
    for path, text in pages():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run {leaderboard.COMMAND}"


def test_every_claim_of_every_committed_run_is_on_the_pages() -> None:
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    page = (RESULTS / "leaderboard.html").read_text(encoding="utf-8")
    paths = [path for path in RESULTS.glob("*/*.json") if path.parent.name in paper_names()]
    assert paths
    for path in paths:
        document = load_results(path)
        assert f'href="{path.relative_to(RESULTS)}"' in page
        for row in document["claims"]:
            assert f"| `{row['id']}`" in text
            assert f'id="{document["paper"]}.{row["id"]}"' in page
    assert "](results/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_verdicts_are_todays_and_a_changed_claim_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A committed number that today's claim judges otherwise stands with today's verdict."""
    path = tmp_path / "toy" / "laptop-reduced.json"
    row = exact(
        "speedup", value=2.0, paper_value=2.0, verdict="not replicated", reason="written under another tolerance"
    )
    write_run(path.parent, [row | {"model_error_rel": None}], paper="toy").rename(path)
    monkeypatch.setattr("shared.compare.merge.PAPERS", ROOT / "tests")
    (cell,) = reference(tmp_path).cells
    assert cell.verdict == "replicated"
    assert cell.row["statement"] == "the method is twice as fast as the baseline"


def test_a_damaged_reference_result_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "m3vit", [exact()])
    path.write_text(json.dumps({"schema_version": 0}))
    with pytest.raises(UserError, match="schema_version 0"):
        reference(tmp_path)
