"""The claims table in Markdown, and the section of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import UserError
from shared.report.markdown import claims_markdown, escape, update_section
from tests.shared.test_report_document import make_claim, make_document


def cells(line: str) -> list[str]:
    """Cells of a Markdown row: bars that are not escaped separate them."""
    return [cell.strip() for cell in line.replace("\\|", "\0").strip().strip("|").split("|")]


def test_the_table_has_claims_then_findings_then_the_scope() -> None:
    text = claims_markdown(make_document())
    lines = text.splitlines()
    assert lines[0] == "| Claim | Paper | Ours | Evidence | Verdict |"
    assert text.index("`edge_accuracy`") < text.index("Findings about the paper") < text.index("`recounted_flops`")
    rows = {cells(line)[0].split("<br>")[0]: cells(line) for line in lines if line.startswith("| `")}
    assert len(rows) == 9
    assert rows["`energy_vs_naive`"][1:] == ["9.23×", "9.23×", "modelled", "✓ replicated"]
    assert rows["`gpu_speed_up`"][1] == "≥ 1.5× †"
    assert rows["`gpu_speed_up`"][4].endswith("suspicious: far better than the paper's number")
    assert "CONTROL PASSED: with model.router=shared" in rows["`multi\\_gate\\_beats\\_single`".replace("\\", "")][4]
    assert "recalled, not read" in text
    assert lines[-1].startswith(
        "Device `zcu104`, scale `reduced`, seed 0; run on AMD EPYC 9R14, 2 cores at commit `9f2c61e0b7`"
    )


@given(st.text())
def test_a_statement_never_breaks_the_table(statement: str) -> None:
    line = next(
        line
        for line in claims_markdown(make_document(claims=[make_claim("a", statement=statement)])).split("\n")
        if line.startswith("| `a`")
    )
    assert len(cells(line)) == 5
    assert cells(line)[-1] == "✓ replicated"


def test_escape() -> None:
    assert escape("a|b <c> *d* $e$\nf") == r"a\|b \<c\> \*d\* \$e\$ f"


def test_a_section_is_replaced_and_the_rest_is_left(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(
        "top\n<!-- claims:begin -->\nold\nold\n<!-- claims:end -->\n<!-- other:begin -->x<!-- other:end -->\n"
    )
    assert update_section(path, "claims", "| new \\1 |") is True
    assert path.read_text() == (
        "top\n<!-- claims:begin -->\n| new \\1 |\n<!-- claims:end -->\n<!-- other:begin -->x<!-- other:end -->\n"
    )
    before = path.stat().st_mtime_ns
    assert update_section(path, "claims", "| new \\1 |\n") is False
    assert path.stat().st_mtime_ns == before


def test_line_ends_of_the_file_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"top\r\n<!-- a:begin --><!-- a:end -->\r\n")
    update_section(path, "a", "one\ntwo")
    assert path.read_bytes() == b"top\r\n<!-- a:begin -->\r\none\r\ntwo\r\n<!-- a:end -->\r\n"


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- a:begin -->",
        "<!-- a:end --><!-- a:begin -->",
        "<!-- a:begin --><!-- a:begin --><!-- a:end -->",
        "<!-- b:begin --><!-- b:end -->",
    ],
)
def test_markers_must_be_there_once_and_in_order(tmp_path: Path, text: str) -> None:
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(UserError, match=r"needs the line '<!-- a:begin -->' once"):
        update_section(path, "a", "x")
    assert path.read_text() == text


def test_a_missing_file_and_a_text_with_a_marker(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.md to update its section 'a'"):
        update_section(tmp_path / "none.md", "a", "x")
    path = tmp_path / "README.md"
    path.write_text("<!-- a:begin --><!-- a:end -->")
    with pytest.raises(UserError, match="holds a marker"):
        update_section(path, "a", "x <!-- a:end --> y")
