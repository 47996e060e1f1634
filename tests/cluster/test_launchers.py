"""A sweep over several processes or a cluster gives the claims of the serial one, whatever is killed on the way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.shared.conftest import ROOT, Project, project  # noqa: F401

SCRIPT = ROOT / "scripts" / "local_slurm.sh"
PAPERS = ("toy", "toy_b", "toy_c")
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "scancel", "sacct")
SWEEP = ("-m", "paper=glob(*)", "tracking=none")


@pytest.fixture
def suite(project: Project) -> Project:  # noqa: F811
    """Three papers, and the launchers."""
    shutil.copytree(
        ROOT / "hydra_plugins", project.folder / "hydra_plugins", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in PAPERS[1:]:
        folder = project.folder / "papers" / name
        shutil.copytree(project.folder / "papers" / "toy", folder)
        config = folder / "conf" / "paper" / f"{name}.yaml"
        config.write_text((folder / "conf" / "paper" / "toy.yaml").read_text().replace("name: toy}", f"name: {name}}}"))
        (folder / "conf" / "paper" / "toy.yaml").unlink()
        (folder / "conf" / "paper_scale" / "toy").rename(folder / "conf" / "paper_scale" / name)
    return project


def claims_of(sweep: Path) -> dict[str, str]:
    """Claims of each paper without their times, as bytes would compare them."""
    found = {}
    for path in sorted(sweep.glob("*/results.json")):
        document: dict[str, Any] = json.loads(path.read_text())
        timeless = [{k: v for k, v in row.items() if k not in {"seconds", "from_cache"}} for row in document["claims"]]
        found[document["paper"]] = json.dumps(timeless)
    return found


@pytest.fixture
def serial(suite: Project) -> dict[str, str]:
    done = suite.run(*SWEEP, "hydra.sweep.dir=serial", "cache=c-serial")
    assert done.returncode == 0, done.stderr
    found = claims_of(suite.folder / "serial")
    assert sorted(found) == list(PAPERS)
    return found


@pytest.mark.slow
def test_joblib_gives_the_claims_of_the_serial_sweep(suite: Project, serial: dict[str, str]) -> None:
    done = suite.run(*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=side", "cache=c-side")
    assert done.returncode == 0, done.stderr
    assert claims_of(suite.folder / "side") == serial
    assert "3 runs of 3 papers" in done.stdout


@pytest.mark.slow
def test_joblib_reports_a_broken_run_and_finishes_the_others(suite: Project) -> None:
    broken = suite.folder / "papers" / "toy_b" / "conf" / "paper" / "toy_b.yaml"
    broken.write_text(broken.read_text().replace("raises: false", "raises: true"))
    done = suite.run(*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=side")
    assert done.returncode == 1
    verdicts = {paper: '"error"' in rows for paper, rows in claims_of(suite.folder / "side").items()}
    assert verdicts == {"toy": False, "toy_b": True, "toy_c": False}


@pytest.mark.slow
def test_twenty_kills_of_a_sweep_change_nothing(suite: Project, serial: dict[str, str]) -> None:
    """The whole process group dies at a random moment, workers and all, and the same command goes on."""
    arguments = (*SWEEP, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=killed", "cache=c-killed")
    for kill in range(20):
        process = suite.popen(*arguments, start_new_session=True)
        time.sleep(0.4 + 0.17 * kill)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
    done = suite.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert claims_of(suite.folder / "killed") == serial


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cluster of one node on this machine."""
    missing = [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no Slurm to start here ({', '.join(missing) or 'needs root'}): scripts/local_slurm.sh install")
    folder = tmp_path / "slurm"
    try:
        started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, timeout=120, check=False)
        if started.returncode != 0:
            pytest.skip(f"Slurm did not start here: {started.stderr.strip()}")
        monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
    finally:
        subprocess.run([SCRIPT, "stop", folder], capture_output=True, timeout=60, check=False)


def running_job(paper: str, sweep: Path, deadline_s: float = 90) -> str:
    """Slurm's id of the array task that trains ``paper``, once it has begun to."""
    number = PAPERS.index(paper)
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        jobs = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%F_%K"], capture_output=True, text=True, check=True)
        for job in jobs.stdout.split():
            calls = sweep.parent / f"calls-{paper}.txt"
            if job.endswith(f"_{number}") and calls.exists() and len(calls.read_text().splitlines()) >= 2:
                return job
        time.sleep(0.2)
    raise AssertionError(f"{paper} did not start to train")


def send(name: str, job: str) -> None:
    """A signal for a job. scancel goes on asking after a job that has left the node because of it, so it is not waited for."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(["scancel", f"--signal={name}", job], capture_output=True, timeout=3, check=False)


@pytest.mark.slow
def test_slurm_requeues_a_preempted_run_and_says_of_a_dead_one_that_it_died(
    suite: Project, serial: dict[str, str], slurm: Path
) -> None:
    for name, sleep_s in {"toy": 4.0, "toy_b": 6.0}.items():  # slow enough to be caught at work
        path = suite.folder / "papers" / name / "conf" / "paper" / f"{name}.yaml"
        text = path.read_text().replace("sleep_s: 0.0", f"sleep_s: {sleep_s}")
        path.write_text(text.replace('calls: ""', f"calls: {suite.folder}/calls-{name}.txt"))
    sweep = suite.folder / "cluster"
    process = suite.popen(
        *SWEEP, "hydra/launcher=slurm", f"hydra.sweep.dir={sweep}", "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.mem_gb=2", "workers=1",
    )  # fmt: skip
    try:
        preempted = running_job("toy", sweep)
        send("USR2", preempted)
        dead = running_job("toy_b", sweep)
        send("KILL", dead)
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 1, out + err
    found = claims_of(sweep)
    assert {name: found[name] for name in ("toy", "toy_c")} == {name: serial[name] for name in ("toy", "toy_c")}
    assert {row["verdict"] for row in json.loads(found["toy_b"])} == {"error", "not tested"}
    steps = (suite.folder / "calls-toy.txt").read_text().splitlines()
    assert len(steps) <= 9 + 1, "the requeued run began anew instead of going on"
    # The same command again: what is done comes from the cache, and the dead run goes on.
    again = suite.run(
        *SWEEP, "hydra/launcher=slurm", f"hydra.sweep.dir={sweep}", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=2", "workers=1"
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    assert claims_of(sweep) == serial
