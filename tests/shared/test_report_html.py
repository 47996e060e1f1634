"""report.html: complete, self-contained, escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import UserError
from shared.report.html import render, table, write_html
from tests.shared.test_report_document import make_claim, make_document

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Elements with their attributes and text; raises where tags are not closed in order."""

    VOID = frozenset({"meta", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[dict[str, Any]] = []
        self.all: list[dict[str, Any]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, "attrs": dict(attrs), "text": "", "path": [item["tag"] for item in self.open]}
        self.all.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.all.append({"tag": tag, "attrs": dict(attrs), "text": "", "path": []})

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def find(self, tag: str, **attrs: str) -> list[dict[str, Any]]:
        names = {key.rstrip("_").replace("_", "-"): value for key, value in attrs.items()}
        return [e for e in self.all if e["tag"] == tag and all(e["attrs"].get(k) == v for k, v in names.items())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "room.png").write_bytes(PNG)
    return folder


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    path = write_html(make_document(), folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_every_row_is_in_its_table_with_all_its_columns(page: Page) -> None:
    for row in make_document()["claims"]:
        assert len(page.find("tr", id=row["id"])) == 1
    claims, findings = page.find("table", class_="claims")
    assert "energy_vs_naive" in claims["text"]
    assert "recounted_flops" not in claims["text"]
    assert "recounted_flops" in findings["text"]
    row = " ".join(page.find("tr", id="multi_gate_beats_single")[0]["text"].split())
    for part in ("↗ direction only", "≥ 1.9 points", "1.4 points", "[0.3, 2.5]", "trained", "5 seeds", "Tab. 1"):
        assert part in row
    assert "the interval excludes zero" in row
    assert "Each seed 0.400 points, 1.10 points" in row.replace("seed0", "seed 0")


def test_flags_stand_in_the_row_and_in_the_summary(page: Page) -> None:
    assert "Control passed:" in page.find("tr", id="multi_gate_beats_single")[0]["text"]
    assert "Suspicious:" in page.find("tr", id="gpu_speed_up")[0]["text"]
    assert "recalled, not read" in page.find("tr", id="gpu_speed_up")[0]["text"]
    assert "Control passed" not in page.find("tr", id="energy_vs_naive")[0]["text"]
    assert "recalled" not in page.find("tr", id="energy_vs_naive")[0]["text"]
    summary = page.find("section")[0]["text"]
    assert "3 of 8 claims replicated, 1 not tested" in summary
    assert "multi_gate_beats_single: with the paper's idea switched off the claim still holds" in summary
    assert "gpu_speed_up: far better" in summary


def test_header_environment_configuration_and_notes(page: Page) -> None:
    header = page.find("header")[0]["text"]
    for part in (
        "m3vit",
        "M³ViT: Mixture",
        "zcu104",
        "reduced",
        "AMD EPYC 9R14, 2 cores",
        "9f2c61e0b7 + local changes",
    ):
        assert part in header
    assert "2026-03-01 14:05 UTC" in header
    assert "5 min 02 s" in header
    assert "num_experts: 16" in page.find("pre")[0]["text"]
    assert "cache entry multi_task-3f2a was corrupt" in page.find("ul", class_="notes")[0]["text"]
    everything = page.find("main")[0]["text"]
    assert "2.14.1" in everything
    assert "Linux-6.1-x86_64" in everything


def test_plots_tables_pictures_and_sensitivity(page: Page, text: str) -> None:
    labels = {svg["attrs"]["aria-label"] for svg in page.find("svg")}
    assert len(page.find("svg")) == 5 + 1 + 1  # a plot of each table that has one, ours against the paper, one tornado
    assert {"Tokens per expert", "Sensitivity of energy_vs_naive"} <= labels
    folded = [item for item in page.find("table") if "details" in item["path"]]
    assert len(folded) == 6 + 1
    assert base64.b64encode(PNG).decode() in text
    assert "flips at ×0.980" in text
    assert "Without a place on this axis: gpu_energy, edge_accuracy." in text


def test_the_page_asks_for_nothing_from_outside(page: Page, text: str) -> None:
    urls = re.findall(r"""(?:src|href|action)\s*=\s*["']([^"']*)|url\(([^)]*)\)|@import""", text)
    for attribute, css in urls:
        assert (attribute or css).startswith(("data:", "#"))
    assert page.find("link") == []
    policy = page.find("meta", http_equiv="Content-Security-Policy")[0]["attrs"]["content"]
    assert policy.startswith("default-src 'none'; img-src data:")
    script = page.find("script")[0]["text"]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_ids_are_unique(page: Page) -> None:
    ids = [element["attrs"]["id"] for element in page.all if "id" in element["attrs"]]
    assert len(ids) == len(set(ids))
    assert len(ids) > 100


def test_numeric_cells_sort_by_value_and_empty_cells_have_no_key(page: Page, text: str) -> None:
    row = text[text.index('<tr id="gpu_energy">') :]
    assert 'data-label="Ours" data-sort=""' in row[: row.index("</tr>")]
    row = text[text.index('<tr id="frame_latency">') :]
    assert 'data-label="Ours" data-sort="0.069002"' in row[: row.index("</tr>")]
    assert all(head["path"][-1] == "tr" for head in page.find("th"))


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_statement_survives_escaping(statement: str) -> None:
    """What a reader of the page sees is the statement, whatever it holds, and it opens no tag."""
    claim = make_claim("a", paper_value=None, statement=statement, reason=statement, verdict="error", source=statement)
    text = render(make_document(claims=[claim], measurements=[], pictures=[], notes=[statement]), Path("."))
    page = Page(text)
    assert page.find("div", class_="statement")[0]["text"] == statement
    assert page.find("td", class_="source")[0]["text"] == statement
    assert page.find("ul", class_="notes")[0]["text"] == statement
    assert len(page.find("script")) == 1
    assert len(page.find("td")) == 6


def test_names_from_the_document_are_escaped_everywhere(tmp_path: Path) -> None:
    evil = "</title><script>alert(1)</script><b a=\"'&$x^2$"
    plot = {
        "kind": "bar",
        "x": evil,
        "y": "y",
        "series": evil,
        "xlabel": evil,
        "ylabel": evil,
        "error": None,
        "hline": None,
    }
    document = make_document(
        paper=evil, title=evil, device=evil, config={evil: evil}, environment={"cpu": evil, "versions": {evil: evil}},
        claims=[make_claim(evil, statement=evil, conditions={evil: evil}, tolerance={"rel": 0.1, "reason": evil},
                           control={"set": evil, "means": evil, "value": 1.0, "verdict": evil, "ok": False},
                           sensitivity=[{"figure": evil, "value_low": 1.0, "value_high": 12.0, "flip_factor": None}])],
        measurements=[{"experiment": evil, "name": evil, "title": evil, "rows": [{evil: evil, "y": 1.0}], "plot": plot, "note": evil}],
        pictures=[{"experiment": evil, "name": evil, "title": evil, "file": evil, "note": evil}],
    )  # fmt: skip
    text = write_html(document, tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "<script>alert" not in text
    assert len(page.find("script")) == 1
    assert page.find("title")[0]["text"] == f"{evil}: {evil}"
    assert len(page.find("svg")) == 3
    assert evil in "".join(item["text"] for item in page.find("svg"))


def test_a_plot_that_cannot_be_drawn_is_said_and_costs_nothing_else(tmp_path: Path) -> None:
    good, bad = make_document()["measurements"][1:3]
    bad["plot"] |= {"y": "no_such_column"}
    page = Page(write_html(make_document(measurements=[bad, good], pictures=[]), tmp_path).read_text(encoding="utf-8"))
    alerts = [item["text"] for item in page.find("p", class_="alert t-error")]
    assert alerts == ["The plot could not be drawn: the table has no column 'no_such_column'."]
    assert len(page.find("svg")) == 3


def test_a_sensitivity_that_cannot_be_drawn_is_said(tmp_path: Path) -> None:
    claim = make_claim("a", paper_value=None, sensitivity=[{"value_low": 1.0, "value_high": 2.0}])
    document = make_document(claims=[claim], measurements=[], pictures=[])
    page = Page(write_html(document, tmp_path).read_text(encoding="utf-8"))
    assert [item["text"] for item in page.find("p", class_="alert t-error")] == [
        "The plot could not be drawn: 'figure'."
    ]


def test_pictures_outside_the_folder_and_missing_ones_are_not_read(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(PNG)
    (tmp_path / "run").mkdir()
    names = ["../secret.png", str(secret), "pictures/none.png"]
    pictures = [{"experiment": "e", "name": "n", "title": "t", "file": name, "note": ""} for name in names]
    page = Page(write_html(make_document(pictures=pictures, measurements=[], claims=[]), tmp_path / "run").read_text())
    assert page.find("img") == []
    assert sum("is missing" in item["text"] for item in page.find("p", class_="alert t-error")) == 3


def test_a_document_with_nothing_in_it_still_makes_a_page(tmp_path: Path) -> None:
    document = make_document(
        claims=[], measurements=[], pictures=[], notes=[], config={}, environment={}, started=None, title=None
    )
    page = Page(write_html(document, tmp_path).read_text(encoding="utf-8"))
    assert "No claim of the paper was run" in page.find("main")[0]["text"]
    assert page.find("svg") == []


def test_the_page_is_the_same_for_the_same_document(folder: Path, text: str) -> None:
    assert render(make_document(), folder) == text


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        write_html(make_document(claims=[], measurements=[], pictures=[]), tmp_path / "file")


def test_a_column_is_numeric_when_all_its_values_are() -> None:
    made = table([{"n": 1, "t": "a", "m": 2}, {"n": None, "t": "b", "m": "x"}, {"b": True}])
    assert [(c["name"], c["numeric"]) for c in made["columns"]] == [
        ("n", True),
        ("t", False),
        ("m", False),
        ("b", False),
    ]
    assert [cell["text"] for cell in made["rows"][2]] == ["–", "–", "–", "yes"]
