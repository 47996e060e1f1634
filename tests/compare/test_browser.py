"""The pages in a real browser: they sort and filter, links lead to a claim's provenance, nothing is asked for from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.compare.changes import changes
from shared.compare.cli import write
from shared.compare.leaderboard import RESULTS
from shared.compare.load import load_runs
from shared.compare.merge import compare
from shared.report.html import write_html
from tests.compare import chromium
from tests.compare.chromium import Browser
from tests.compare.runs import environment, exact, todays, trained, write_run
from tests.shared.test_report_document import make_document

pytestmark = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine")
PICTURES = os.environ.get("PAPERCHECK_SCREENSHOTS")  # a folder, to look at the pages
SIZES = [(width, dark) for width in (1360, 390) for dark in (False, True)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of seven runs with everything that a page can show."""
    folder = tmp_path_factory.mktemp("comparison")
    miss = {"value": 4.0, "verdict": "not replicated", "reason": "4 is not 9.23 ± 0.046"}
    speed = exact("speed", value=2.5, paper_value=2.0, verdict="direction only", reason="the device is another")
    finding = exact("recount", kind="finding", paper_value=None, stated_value=72.0, value=72.04, unit="%")
    config = {"model": {"num_experts": 16, "top_k": 4}}
    write_run(folder / "a", [exact(), speed, trained([1.0, 2.0, 3.0]), finding], config=config)
    write_run(
        folder / "b",
        [exact(), trained([2.0, 3.0, 4.0])],
        seed=1,
        minute=1,
        config={"model": {"num_experts": 64, "top_k": 4}},
    )
    write_run(folder / "c", [exact(**miss)], minute=2, config=config, environment=environment(commit="b" * 40))
    write_run(
        folder / "d",
        [exact(value=5.0), speed],
        minute=3,
        device="a100",
        config=config,
        environment=environment(cpu="Server", gpu="NVIDIA H200"),
    )
    untested = exact("gpu", value=None, verdict="not tested", reason="needs an NVIDIA GPU, this machine has none")
    write_run(
        folder / "e",
        [exact("accuracy", value=0.5, unit="percent"), untested],
        minute=4,
        paper="ear",
        title="Efficient adaptation",
    )
    (folder / "cut").mkdir()
    (folder / "cut" / "results.json").write_text('{"schema_version": 1, "paper": "lsm"')
    comparison = compare(*load_runs([folder]), claims=todays)
    write_html(make_document(), folder)
    write(comparison, changes(comparison), folder)
    return folder / "comparison.html"


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(autouse=True)
def _quiet(chrome: Browser) -> Iterator[None]:
    """No page may ask for anything, nor make its own policy or a script complain."""
    chrome.look(1360, 1000)
    chrome.requests.clear()
    chrome.errors.clear()
    yield
    assert [url for url in chrome.requests if not url.startswith(("file:", "data:", "about:"))] == []
    assert chrome.errors == []


def shown(chrome: Browser, column: int) -> list[str]:
    """The first line of a column of the claims that are shown, from top to bottom."""
    script = "[...document.querySelectorAll('#claims-table tbody tr')].filter((row) => row.offsetParent).map((row) => "
    return [str(text) for text in chrome.run(f"{script}row.cells[{column}].firstElementChild.textContent.trim())")]


def test_a_table_is_sorted_by_its_head(page: Path, chrome: Browser) -> None:
    chrome.open(page)
    chrome.click("#claims-table th:nth-child(4) button")
    values = chrome.run(
        "[...document.querySelectorAll('#claims-table tbody tr')].map((row) => row.cells[3].dataset.sort)"
    )
    numbers = [float(value) for value in values if value]
    assert numbers == sorted(numbers)
    assert len(numbers) > 5
    assert values[-1] == ""  # a claim without a number stays last, in both directions
    chrome.click("#claims-table th:nth-child(4) button")
    values = chrome.run(
        "[...document.querySelectorAll('#claims-table tbody tr')].map((row) => row.cells[3].dataset.sort)"
    )
    assert [float(value) for value in values if value] == sorted(numbers, reverse=True)
    assert values[-1] == ""
    assert chrome.run("document.querySelector('#claims-table th[aria-sort]').getAttribute('aria-sort')") == "descending"


def test_claims_are_filtered_by_verdict_paper_and_text(page: Path, chrome: Browser) -> None:
    chrome.open(page)
    everything = shown(chrome, 1)
    chrome.click("button[data-verdict='not replicated']")
    assert shown(chrome, 1) == ["m3vit / memory"]
    assert chrome.run("document.querySelector('.filters output').textContent") == f"1 of {len(everything)} rows"
    chrome.click("button[data-verdict='not replicated']")
    assert shown(chrome, 1) == everything
    chrome.write(".filters input", "nvidia h200 speed")
    assert shown(chrome, 1) == ["m3vit / speed"]
    chrome.run("document.querySelector('.filters').reset()")
    chrome.click("[data-pick=ear]")
    assert shown(chrome, 1) == ["ear / accuracy", "ear / gpu"]
    chrome.write(".filters input", "nothing has this")
    assert shown(chrome, 1) == []
    assert chrome.run("document.getElementById('nothing').offsetParent !== null")


def test_a_claim_leads_to_its_provenance(page: Path, chrome: Browser) -> None:
    """From the claim to the run (machine, commit, device), and from there to the configuration and the results themselves."""
    chrome.open(page)
    row = "[id='m3vit.memory']"
    assert "Tab. 4" in chrome.run(f'document.querySelector("{row}").textContent')
    chrome.click(f"{row} .source a")
    chrome.wait("location.hash.startsWith('#run-')")
    run = chrome.run("document.querySelector(location.hash).textContent")
    for part in ("m3vit", "zcu104", "Laptop, 2 cores", "bbbbbbbbbb", "2026-03-01"):
        assert part in run
    target = chrome.run(
        "(() => { const r = document.querySelector(location.hash).getBoundingClientRect(); return [r.top, r.bottom]; })()"
    )
    assert 0 <= target[0] < target[1] <= 1000  # it was scrolled to
    href = chrome.run("document.querySelector(location.hash + ' a').getAttribute('href')")
    assert (page.parent / href).is_file()
    chrome.click(":target a[href^='#config']")
    chrome.wait("location.hash.startsWith('#config-')")
    chrome.wait("document.querySelector(location.hash).open")
    assert "num_experts: 16" in chrome.run("document.querySelector(location.hash).innerText")


def test_a_link_to_a_row_that_is_filtered_out_shows_it(page: Path, chrome: Browser) -> None:
    chrome.open(page)
    chrome.click("button[data-verdict='not replicated']")
    chrome.click(".chip[href='#ear.accuracy']")
    chrome.wait("document.getElementById('ear.accuracy').offsetParent !== null")


def test_the_page_says_what_was_skipped_what_changed_and_what_was_kept_apart(page: Path, chrome: Browser) -> None:
    chrome.open(page)
    text = chrome.run("document.body.innerText")
    assert "cut/results.json is not valid JSON" in text
    assert "ours went from 9.23× to 4.00×" in text
    assert "model.num_experts=16 instead of 64" in text or "model.num_experts=64 instead of 16" in text
    assert chrome.run("[...document.querySelectorAll('th')].filter((head) => head.textContent === 'a100').length") == 1


@pytest.mark.parametrize(("width", "dark"), SIZES)
@pytest.mark.parametrize("name", ["comparison.html", "report.html", "leaderboard.html"])
def test_pages_fit_the_screen_and_can_be_read(page: Path, chrome: Browser, name: str, width: int, dark: bool) -> None:
    """Nothing sticks out of a phone's screen, and text differs from its ground as the WCAG asks (4.5 to 1)."""
    path = RESULTS / name if name == "leaderboard.html" else page.with_name(name)
    chrome.look(width, 1000 if width > 600 else 844, dark=dark)
    chrome.open(path)
    assert chrome.run("document.documentElement.scrollWidth") <= width
    assert {part: ratio for part, ratio in chrome.run(CONTRAST).items() if ratio < 4.5} == {}
    if PICTURES:
        chrome.look(width, min(4000, chrome.run("document.documentElement.scrollHeight")), dark=dark)
        chrome.picture(Path(PICTURES) / f"{path.stem}-{width}-{'dark' if dark else 'light'}.png")


CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const paint = (colours) => {  // colours one over the other, as the screen shows them
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    const linear = (c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((c) => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = {};
  for (const part of ['h1', 'p.muted', '.badge', '.reason', '.claims .id', '.sub', 'th', 'a', '.alert', 'footer', '.chip']) {
    for (const element of document.querySelectorAll(part)) {
      const grounds = [];
      for (let up = element; up; up = up.parentElement) grounds.unshift(getComputedStyle(up).backgroundColor);
      const [one, other] = [paint(grounds), paint([...grounds, getComputedStyle(element).color])];
      const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
      const key = `${part} ${element.className}`;
      found[key] = Math.min(found[key] ?? 99, ratio);
    }
  }
  return found;
})()"""
