"""``run.py -m``: one display, one line a claim, a summary with the time of each paper, and the worst status of all runs."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.shared.conftest import ROOT, Project, project

__all__ = ["project"]

SWEEP = ("-m", "paper=glob(*)", "seed=0,1", "claims=[speedup,broken]", "out=sweep", "tracking=none")


@pytest.fixture
def two_papers(project: Project) -> Project:
    """The toy paper twice, under two names."""
    papers = project.folder / "papers"
    if (ROOT / "hydra_plugins").is_dir():
        shutil.copytree(ROOT / "hydra_plugins", project.folder / "hydra_plugins")
    shutil.copytree(papers / "toy", papers / "second")
    for kind in ("paper", "paper_scale"):
        (papers / "second" / "conf" / kind / ("toy" if kind == "paper_scale" else "toy.yaml")).rename(
            papers / "second" / "conf" / kind / ("second" if kind == "paper_scale" else "second.yaml")
        )
    config = papers / "second" / "conf" / "paper" / "second.yaml"
    config.write_text(config.read_text().replace("name: toy", "name: second"))
    return project


def test_one_line_a_claim_and_a_summary(two_papers: Project) -> None:
    done = two_papers.run(*SWEEP)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for paper in ("second", "toy"):
        for seed in (0, 1):
            for claim in ("speedup", "broken"):
                assert sum(f"{paper} seed {seed}  {claim} " in line for line in lines) == 1
    start = lines.index("Summary of the sweep")
    assert [line.split()[0] for line in lines[start + 1 : start + 3]] == ["second", "toy"]
    for line in lines[start + 1 : start + 3]:
        assert "2 runs  ✓ 4 replicated" in line
        assert line.split()[2] in ("ms", "s")  # the time of the paper
    assert lines[start + 3].startswith("4 runs of 2 papers in ")
    assert lines[-1] == str(two_papers.folder / "sweep")
    assert len(list((two_papers.folder / "sweep").glob("*/report.html"))) == 4


def test_notes_of_reports_made_in_the_background_are_shown(two_papers: Project) -> None:
    (two_papers.folder / "wandb.py").write_text("raise ImportError('libfoo is missing')")
    done = two_papers.run(*SWEEP, "tracking=offline")
    assert done.returncode == 0, done.stderr
    for label in ("second seed 0", "second seed 1", "toy seed 0", "toy seed 1"):
        assert f"{label}: note: nothing was logged to W&B: libfoo is missing" in done.stdout


def test_an_interrupted_sweep_ends_soon_and_keeps_what_was_finished(two_papers: Project) -> None:
    arguments = [part for part in SWEEP if not part.startswith("claims")]
    with two_papers.popen(*arguments, "++train.sleep_s=0.5", "++train.steps=20") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "broken" in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "same command goes on" in err
    assert "Traceback" not in err


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_sweep_leaves_no_process_behind(two_papers: Project) -> None:
    arguments = [part for part in SWEEP if not part.startswith("claims")]
    with two_papers.popen(*arguments, "++train.sleep_s=0.5", "++train.steps=4", "workers=1") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("second seed 0: "):  # its report is being made, and the next run has begun
                break
        time.sleep(0.5)
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = listed.read_text().split() if listed.exists() else []
        process.kill()
        process.communicate(timeout=60)
    assert children or not listed.exists()
    deadline = time.monotonic() + 30
    while any(map(alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_that_cannot_start_is_named_and_the_others_go_on(two_papers: Project) -> None:
    done = two_papers.run(*(argument.replace("seed=0,1", "seed=0,-1") for argument in SWEEP))
    assert done.returncode == 2
    assert "no result: 1-second-zcu104-reduced-seed-1" in done.stdout
    assert "no result: 3-toy-zcu104-reduced-seed-1" in done.stdout
    assert "4 runs of 2 papers" in done.stdout


def test_a_broken_experiment_is_status_1(two_papers: Project) -> None:
    done = two_papers.run(*SWEEP, "++fault.raises=true")
    assert done.returncode == 1
    assert "! 2 error" in done.stdout


def test_runs_in_other_processes_come_to_the_same_summary_and_status(two_papers: Project) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    joblib = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done = two_papers.run(*SWEEP, "++fault.raises=true", *joblib)
    assert done.returncode == 1
    assert "4 runs of 2 papers in " in done.stdout
    assert "! 2 error" in done.stdout


def test_a_second_sweep_into_the_same_folder_counts_its_own_runs_only(two_papers: Project) -> None:
    assert two_papers.run(*SWEEP).returncode == 0
    old = time.time() - 3600
    for path in (two_papers.folder / "sweep").glob("*/results.json"):
        os.utime(path, (old, old))
    done = two_papers.run(*(argument.replace("seed=0,1", "seed=-1,1") for argument in SWEEP))
    assert done.returncode == 2
    assert done.stdout.count("no result: ") == 2


def test_a_terminal_has_one_progress_display(two_papers: Project) -> None:
    """On a terminal the bar of the whole sweep is there from the first run to the last, and no run prints its own table."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, "run.py", *SWEEP],
        cwd=two_papers.folder,
        stdout=follower,
        stderr=subprocess.STDOUT,
        env=environment,
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        seen += part
    assert process.wait(timeout=60) == 0
    text = seen.decode(errors="replace")
    assert "0/4" in text
    assert "3/4" in text
    assert "Claims of the paper" not in text
    assert "Summary of the sweep" in text


def test_a_sweep_needs_no_wandb(two_papers: Project) -> None:
    (two_papers.folder / "wandb.py").write_text("raise ImportError('wandb cannot be imported')")
    done = two_papers.run(*SWEEP)
    assert done.returncode == 0, done.stderr
    assert "cannot be imported" not in done.stdout + done.stderr
    assert len(list(Path(two_papers.folder / "sweep").glob("*/results.json"))) == 4
