"""What verdict changed, and why: along commits and between two folders of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shared.compare import changelog
from shared.compare.changes import changes
from shared.compare.load import load_runs
from shared.compare.merge import compare
from shared.errors import UserError
from tests.compare.runs import environment, exact, todays, trained, write_run

LATER = {"minute": 5, "environment": environment(commit="b" * 40)}
MISS = {"verdict": "not replicated", "reason": "4 is not 9.23 ± 0.046"}


def found(folder: Path) -> list[Any]:
    return changes(compare(*load_runs([folder]), claims=todays))


@pytest.mark.parametrize(
    ("row", "run", "words"),
    [
        (exact(value=4.0, **MISS), {}, ["ours went from 9.23× to 4.00×", "4 is not 9.23"]),
        (exact(tolerance={"rel": 0.05}, **MISS), {}, ["the tolerance went from ±0.5 % to ±5 %"]),
        (exact(paper_value=4.0, **MISS), {}, ["the stated number went from 9.23× to 4×"]),
        (exact(value=None, verdict="error", reason="KeyError: 'x'"), {}, ["there is no number any more", "KeyError"]),
        (exact(verdict="direction only"), {}, ["the rules of judging changed from aaaaaaaaaa to bbbbbbbbbb"]),
        (exact(**MISS), {"config": {"model": {"top_k": 2}}}, ["model.top_k went from 4 to 2"]),
        (
            exact(**MISS),
            {"environment": environment(commit="b" * 40, versions={"torch": "3.0"})},
            ["torch 2.14.1 to 3.0"],
        ),
        (
            exact(**MISS),
            {"environment": environment(commit="b" * 40, cpu="Server")},
            ["another machine (Laptop, 2 cores, then Server"],
        ),
    ],
)
def test_a_changed_verdict_says_why(tmp_path: Path, row: dict[str, Any], run: dict[str, Any], words: list[str]) -> None:
    config = {"model": {"top_k": 4}}
    write_run(tmp_path / "old", [exact()], config=config)
    write_run(tmp_path / "new", [row], **({"config": config} | LATER | run))
    (change,) = found(tmp_path)
    assert (change.old.verdict, change.new.verdict) == ("replicated", row["verdict"])
    for word in words:
        assert word in change.why


def test_the_same_machine_and_configuration_is_held_against_itself(tmp_path: Path) -> None:
    """A server's failure must not hide that the laptop's verdict is what it was, nor be blamed on the laptop's number."""
    server = environment(cpu="Server")
    write_run(tmp_path / "a", [exact()])
    write_run(tmp_path / "b", [exact(value=4.0, **MISS)], environment=server, minute=1)
    write_run(tmp_path / "c", [exact()], **LATER)
    write_run(
        tmp_path / "d", [exact(value=5.0, **MISS)], environment=environment(cpu="Server", commit="b" * 40), minute=6
    )
    assert found(tmp_path) == []


def test_a_machine_that_cannot_test_changes_nothing(tmp_path: Path) -> None:
    gpu = environment(cpu="Server", gpu="NVIDIA H200")
    write_run(tmp_path / "a", [exact()], environment=gpu)
    write_run(tmp_path / "b", [exact(value=None, verdict="not tested", reason="needs an NVIDIA GPU")], **LATER)
    assert found(tmp_path) == []


def test_every_step_of_three_commits_is_told(tmp_path: Path) -> None:
    for minute, (commit, row) in enumerate((("a", exact()), ("b", exact(value=4.0, **MISS)), ("c", exact()))):
        write_run(tmp_path / commit, [row], minute=minute, environment=environment(commit=commit * 40))
    assert [(change.old.commit[0], change.new.commit[0], change.new.verdict) for change in found(tmp_path)] == [
        ("a", "b", "not replicated"),
        ("b", "c", "replicated"),
    ]


def test_more_seeds_are_a_cause(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [trained([0.1, 2.0, 0.2], verdict="not replicated", reason="no significant effect")])
    write_run(tmp_path / "b", [trained([0.9, 1.0, 1.1, 1.2, 0.8])], **LATER)
    (change,) = found(tmp_path)
    assert "3 seeds became 5" in change.why


def test_the_change_log_is_made_from_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "CHANGELOG.md"
    log.write_text("# Changes\n\n<!-- verdicts:begin -->\nold\n<!-- verdicts:end -->\n\nThe rest.\n")
    monkeypatch.setattr(changelog, "CHANGELOG", log)
    write_run(tmp_path / "old" / "m3vit", [exact(), exact("gone"), exact("same")])
    write_run(tmp_path / "new" / "m3vit", [exact(value=4.0, **MISS), exact("came"), exact("same")], **LATER)
    write_run(
        tmp_path / "new" / "ear", [exact("x"), exact("y", value=None, verdict="not tested")], paper="ear", minute=7
    )
    assert changelog.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    lines = log.read_text().splitlines()
    assert lines[3:7] == [
        "- **m3vit** `memory` (zcu104, reduced): ✓ replicated → ✗ not replicated. ours went from 9.23× to 4.00×; 4 is not 9.23 ± 0.046.",
        "- **ear**, new: 1 replicated, 1 not tested.",
        "- **m3vit**: newly checked: 1 replicated.",
        "- **m3vit**: no longer checked: `gone`.",
    ]
    assert lines[-1] == "The rest."
    assert changelog.main([str(tmp_path / "new"), str(tmp_path / "new")]) == 0
    assert "No verdict changed." in log.read_text()
    assert changelog.main(["no-such-thing", str(tmp_path / "new")]) == 2
    assert "neither a folder nor a revision" in capsys.readouterr().err


def test_a_revision_of_the_repository_is_a_folder_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    from contextlib import ExitStack

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    git("init")
    write_run(tmp_path / "results" / "m3vit", [exact()])
    git("add", ".")
    git("commit", "-m", "results")
    write_run(tmp_path / "results" / "m3vit", [exact(value=4.0, **MISS)], **LATER)
    monkeypatch.setattr(changelog, "ROOT", tmp_path)
    with ExitStack() as stack:
        old, new = (changelog.read(place, stack) for place in ("HEAD", str(tmp_path / "results")))
        assert old is not None
        assert new is not None
        assert "✓ replicated → ✗ not replicated" in changelog.verdict_section(old, new)
        with pytest.raises(UserError, match="neither a folder nor a revision"):
            changelog.read("v9", stack)
