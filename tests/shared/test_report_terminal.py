"""The table and the lines on a terminal, and progress."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from shared.report.format import GLYPHS, VERDICTS
from shared.report.progress import Progress
from shared.report.terminal import claim_line, claims_table, print_results, summary_line
from tests.shared.test_report_document import make_claim, make_document


def render(document: dict[str, Any], width: int, *, colour: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system="standard" if colour else None)
    console.print(claims_table(document))
    return stream.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 200])
def test_the_table_fits_and_shows_every_claim(width: int) -> None:
    lines = render(make_document(), width).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    text = "\n".join(lines)
    for row in make_document()["claims"]:
        assert row["id"] in text
        line = next(line for line in lines if row["id"] in line)
        assert f"{GLYPHS[row['verdict']]} {row['verdict']}" in line
    assert (
        text.index("Claims of the paper")
        < text.index("edge_accuracy")
        < text.index("Findings")
        < text.index("recounted_flops")
    )


def test_the_statement_moves_beside_the_id_on_a_wide_terminal() -> None:
    statement = "On-chip memory falls 2.40×"
    narrow, wide = (
        next(line for line in render(make_document(), w).splitlines() if statement in line) for w in (80, 160)
    )
    assert "on_chip_memory" not in narrow
    assert wide.startswith("on_chip_memory")


def test_numbers_reasons_flags_and_recalled_figures() -> None:
    text = render(make_document(), 160)
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert "9.23×" in lines["energy_vs_naive"]
    assert "≥ 1.5×†" in lines["gpu_speed_up"]
    assert "41× [38, 44]" in lines["gpu_speed_up"]
    assert "†" not in lines["energy_vs_naive"]
    assert "† the paper's figure is recalled" in text
    assert "↳ 67.8 % is outside 88 ± 1 %" in text
    assert "✗ control passed: with model.router=shared (one router for all tasks) the claim still holds" in text
    assert text.count("control passed") == 1
    assert text.count("⚠ suspicious") == 1
    assert "note: cache entry multi_task-3f2a was corrupt" in text


def test_a_passed_control_is_red_and_a_replicated_claim_has_no_reason() -> None:
    coloured = render(make_document(), 160, colour=True)
    line = next(line for line in coloured.splitlines() if "control passed" in line)
    assert "\x1b[1;31m" in line
    quiet = render(make_document(claims=[make_claim("a", reason="within tolerance")]), 160)
    assert "within tolerance" not in quiet
    assert "recalled" not in quiet


def test_text_of_a_claim_is_never_markup() -> None:
    text = render(make_document(claims=[make_claim("a", statement="[bold]x[/bold] [/red] :smile:")]), 160)
    assert "[bold]x[/bold] [/red] :smile:" in text


def test_the_summary_has_counts_seconds_and_machine() -> None:
    assert summary_line(make_document()).plain == (
        "✓ 3 replicated · ↗ 2 direction only · ✗ 1 not replicated · ○ 1 not tested · ! 1 error · "
        "findings: ✓ 1 replicated · 5 min 02 s · AMD EPYC 9R14, 2 cores"
    )
    environment = {"cpu": "x", "num_cores": 1, "gpu": "H200"}
    assert summary_line(make_document(claims=[], environment=environment)).plain == "5 min 02 s · x, 1 core, H200"


def test_claim_line_is_one_line() -> None:
    claims = {row["id"]: row for row in make_document()["claims"]}
    assert claim_line(claims["energy_vs_naive"]).plain == (
        "✓ replicated      energy_vs_naive  9.23×  (paper 9.23×)  modelled  0.4 s"
    )
    assert claim_line(claims["frame_latency"]).plain.endswith("modelled  cached")
    assert claim_line(claims["gpu_energy"]).plain == "○ not tested      gpu_energy  measured  needs a CUDA device"
    assert "(stated 72 %)" in claim_line(claims["recounted_flops"]).plain
    line = claim_line(claims["multi_gate_beats_single"])
    assert "control passed" in line.plain
    assert any(
        "red" in str(span.style) and "control passed" in line.plain[span.start : span.end] for span in line.spans
    )
    assert "\n" not in claim_line(make_claim("a", verdict="error", reason="first\nsecond")).plain


def test_plain_lines_when_not_a_terminal() -> None:
    stream = io.StringIO()
    print_results(make_document(), Console(file=stream, width=80))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 9 + 1 + 1  # a line for each claim whatever its length, one note, the summary
    assert "\x1b" not in stream.getvalue()
    assert lines[-1] == summary_line(make_document()).plain
    assert [line.split("  ")[0].split(" ", 1)[1] for line in lines[:9]] == [
        row["verdict"] for row in make_document()["claims"]
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_an_encoding_without_the_glyphs_gets_ascii(terminal: bool) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_results(make_document(), Console(file=stream, force_terminal=terminal, width=120, color_system=None))
    stream.flush()
    text = raw.getvalue().decode("ascii")
    for verdict, glyph in zip(VERDICTS, "+~x-!", strict=True):
        assert f"{glyph} {verdict}" in text
    assert "9.23x" in text


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_is_an_occasional_line_when_not_a_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(Console(file=stream, width=200), quiet_s=10.0, clock=clock) as progress:
        with progress.task("multi_task", total=3) as seeds, seeds.task("seed 0", total=1000) as steps:
            for done in range(10, 1001, 10):
                clock.now += 0.25  # 25 s in all: two lines
                steps(done)
        progress.print(Text("between"))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "multi_task: seed 0: 400 of 1,000 (40%), 10.0 s",
        "multi_task: seed 0: 800 of 1,000 (80%), 20.0 s",
        "between",
    ]


def test_progress_bars_nest_on_a_terminal_and_vanish() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with Progress(console) as progress:
        assert progress.bars is not None
        with progress.task("outer [x]", total=2) as outer:
            with outer.task("inner") as inner:
                inner.advance(5)
                inner(6, 12)
                names = [task.description for task in progress.bars.tasks]
                assert names == ["outer [x]", "  inner"]
                assert (progress.bars.tasks[1].completed, progress.bars.tasks[1].total) == (6, 12)
            outer.advance()
            assert [task.description for task in progress.bars.tasks] == ["outer [x]"]
            assert progress.bars.tasks[0].completed == 1
            progress.print(claim_line(make_claim("a")))
        assert progress.bars.tasks == []
    assert "energy" not in stream.getvalue()
    assert "✓ replicated" in stream.getvalue()


def test_a_task_that_breaks_takes_its_bar_along() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress(console) as progress:
        with pytest.raises(ValueError, match="boom"), progress.task("a", total=1):
            raise ValueError("boom")
        assert progress.bars is not None
        assert progress.bars.tasks == []


def test_importing_the_report_is_cheap() -> None:
    """No torch, and neither matplotlib nor wandb nor jinja2 before they are needed."""
    code = (
        "import sys\n"
        "import shared.report, shared.report.document, shared.report.html, shared.report.markdown\n"
        "import shared.report.plots, shared.report.progress, shared.report.terminal, shared.report.tracking\n"
        "print(sorted({'torch', 'matplotlib', 'wandb', 'jinja2', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
