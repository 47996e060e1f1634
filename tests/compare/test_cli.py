"""``python compare.py`` from end to end: what it writes, what it refuses, how long it takes, what it logs to W&B."""

from __future__ import annotations

import csv
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.report.tracking import log_wandb
from tests.compare.runs import environment, exact, trained, write_run
from tests.shared.conftest import ROOT
from tests.shared.test_report_tracking import make_run

NO_SERVER = {"WANDB_BASE_URL": "http://127.0.0.1:9"}  # the discard port: nothing listens there
CUT = ["unshare", "--map-root-user", "--net"]  # a process without any network, the local one included


def compare(
    folder: Path, *arguments: str, prefix: tuple[str, ...] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return subprocess.run(
        [*prefix, sys.executable, str(ROOT / "compare.py"), *arguments],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        env={**clean, **NO_SERVER, "WANDB_CONFIG_DIR": str(folder / "no-settings"), **env},
    )  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two devices, two machines, two commits, a changed verdict, and runs of other settings."""
    miss = {"value": 4.0, "verdict": "not replicated", "reason": "4 is not 9.23"}
    write_run(tmp_path / "runs" / "a", [exact(), trained([1.0, 2.0, 3.0])])
    write_run(
        tmp_path / "runs" / "b",
        [exact(), trained([2.0, 3.0, 4.0])],
        seed=1,
        minute=1,
        config={"model": {"num_experts": 64}},
    )
    write_run(tmp_path / "runs" / "c", [exact(**miss)], minute=2, environment=environment(commit="b" * 40))
    write_run(
        tmp_path / "runs" / "d", [exact(value=5.0)], minute=3, device="a100", environment=environment(cpu="Server")
    )
    write_run(tmp_path / "runs" / "e", [exact("accuracy")], minute=4, paper="ear", title="Efficient adaptation")
    return tmp_path


def test_tables_of_all_kinds(runs: Path) -> None:
    done = compare(runs, "runs", "tracking=none", "out=tables")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tables/comparison.html"
    assert "changed: m3vit memory: replicated → not replicated: ours went from 9.23× to 4.00×" in done.stdout
    assert "kept apart: m3vit on zcu104" in done.stdout
    with (runs / "tables" / "claims.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    row = next(row for row in rows if row["claim"] == "memory" and row["device"] == "zcu104")
    assert (row["value"], row["verdict"], row["commit"], row["machine"]) == (
        "4.0",
        "not replicated",
        "b" * 10,
        "Laptop, 2 cores",
    )
    assert (row["stated"], row["stated_value"], row["paper"]) == ("9.23×", "9.23", "m3vit")
    gains = [row for row in rows if row["claim"] == "gain"]
    assert sorted(float(row["value"]) for row in gains) == [2.0, 3.0]
    text = (runs / "tables" / "comparison.md").read_text()
    by_device = "| `memory` | ✓ 5.00× | ✗ 4.00× |"
    for part in ("## Changed verdicts", "## ear: Efficient adaptation", "m3vit by device:", by_device, "## Kept apart"):
        assert part in text
    assert {path.name for path in (runs / "tables").iterdir()} == {
        *("comparison.html", "comparison.md", "claims.csv", "devices.csv", "changes.csv"),
    }


def test_a_damaged_file_is_named_the_rest_compared_and_the_status_is_1(runs: Path) -> None:
    cut = runs / "runs" / "e" / "results.json"
    cut.write_text(cut.read_text()[:-300])
    old = runs / "runs" / "d" / "results.json"
    old.write_text(old.read_text().replace('"schema_version": 1', '"schema_version": 0'))
    done = compare(runs, "runs", "tracking=none")
    assert done.returncode == 1
    skipped = [line for line in done.stderr.splitlines() if line.startswith("skipped: ")]
    assert len(skipped) == len(done.stderr.splitlines()) == 2
    assert any("runs/e/results.json is not valid JSON" in line for line in skipped)
    assert any(
        "runs/d/results.json has schema_version 0, this version reads 1: run the paper again" in line
        for line in skipped
    )
    page = (runs / "outputs" / "comparison" / "comparison.html").read_text()
    assert "m3vit" in page
    assert "runs/e/results.json is not valid JSON" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "there is no nowhere"),
        (("runs", "tracking=mlflow"), "choose one of: none, offline, wandb"),
        (("runs", "ouput=x"), "unknown key 'ouput'"),
        (("runs", "--sort"), "no option --sort"),
        (("out=x",), "no folder of finished runs"),
        (("runs", "out=runs/a/results.json/x", "tracking=none"), "cannot write"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(runs: Path, arguments: tuple[str, ...], words: str) -> None:
    done = compare(runs, *arguments)
    assert done.returncode == 2, done.stdout
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_help(tmp_path: Path) -> None:
    done = compare(tmp_path, "--help")
    assert done.returncode == 0
    assert "tracking=wandb" in done.stdout


def test_none_needs_no_wandb_and_offline_says_that_it_is_not_there(runs: Path) -> None:
    (runs / "broken").mkdir()
    (runs / "broken" / "wandb.py").write_text("raise ImportError('wandb cannot be imported')")
    env = {"PYTHONPATH": str(runs / "broken")}
    none = compare(runs, "runs", "tracking=none", **env)
    assert (none.returncode, none.stderr) == (0, "")
    assert "note" not in none.stdout
    offline = compare(runs, "runs", **env)
    assert offline.returncode == 0
    assert "note: nothing was logged to W&B: wandb cannot be imported" in offline.stdout


def records(folder: Path) -> Iterator[dict[str, Any]]:
    """The records of the one offline run below a folder, by W&B's own reader."""
    (run,) = folder.glob("wandb/offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "No such command" in done.stderr:
        pytest.skip("this version of W&B has no reader for the command line")
    assert done.returncode == 0, done.stderr
    yield from map(json.loads, done.stdout.splitlines())


def has_unshare() -> bool:
    try:
        return subprocess.run([*CUT, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize(
    "prefix", [(), pytest.param(tuple(CUT), marks=pytest.mark.skipif(not has_unshare(), reason="needs unshare"))]
)
def test_the_offline_run_is_read_back_by_wandb(runs: Path, prefix: tuple[str, ...]) -> None:
    pytest.importorskip("wandb")
    done = compare(runs, "runs", "out=tables", prefix=prefix)
    assert done.returncode == 0, done.stderr
    assert "note" not in done.stdout
    found = list(records(runs / "tables"))
    (started,) = [record["run"] for record in found if record["type"] == "run"][:1]
    assert (started["project"], started["run_group"]) == ("papercheck", "comparison")
    assert started["config"]["update"]["num_runs"] == 5
    assert started["config"]["update"]["devices"] == ["a100", "zcu104"]
    logged = {path["path"] for record in found if record["type"] == "files" for path in record["files"]["files"]}
    (table_path,) = [path for path in logged if "/comparison_" in path]
    (folder,) = (runs / "tables").glob("wandb/offline-run-*")
    table = json.loads((folder / "files" / table_path).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    with (runs / "tables" / "claims.csv").open(newline="") as file:
        expected = list(csv.DictReader(file))
    assert [(row["paper"], row["claim"], row["verdict"]) for row in rows] == [
        (row["paper"], row["claim"], row["verdict"]) for row in expected
    ]
    assert any("/changes_" in path for path in logged)
    assert any("/kept_apart_" in path for path in logged)
    assert found[-1]["type"] == "exit"


def test_the_offline_run_of_a_result_is_read_back_by_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims table, plots, device and configuration of one run, without a server."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", NO_SERVER["WANDB_BASE_URL"])
    document = make_run(tmp_path / "run")
    assert log_wandb(document, tmp_path / "run") is None
    found = list(records(tmp_path / "run"))
    config = next(record["run"]["config"]["update"] for record in found if record["type"] == "run")
    assert (config["device"], config["scale"], config["seed"]) == ("zcu104", "reduced", 0)
    assert config["config"] == document["config"]
    logged = {path["path"] for record in found if record["type"] == "files" for path in record["files"]["files"]}
    assert any(path.startswith("media/table/claims_") for path in logged)
    assert any(path.startswith("media/html/plots/flops/macs_") for path in logged)
    summaries = json.dumps([record for record in found if record["type"] == "summary"])
    assert "claims/energy_vs_naive/value" in summaries


def test_a_thousand_runs_take_less_than_five_seconds(tmp_path: Path) -> None:
    """Processor time, which on a free core is the time that passes; 40 claims and a configuration of 3 kB a run."""
    figures = {f"figure_{index}": {"value": index, "unit": "B/s", "source": "data sheet"} for index in range(40)}
    claims = [
        exact(f"claim_{index}") if index % 4 else trained([1.0, 1.5, 2.0], f"claim_{index}") for index in range(40)
    ]
    for index in range(1000):
        papers, devices = f"paper_{index % 7}", f"device_{index // 7 % 5}"
        machine = environment(cpu=f"CPU {index % 3}", commit=f"{index // 250}" * 40)
        config = {"device": figures | {"id": devices}, "model": {"top_k": 4 + index % 2}}
        write_run(
            tmp_path / "runs" / str(index),
            claims,
            minute=index,
            paper=papers,
            device=devices,
            seed=index,
            config=config,
            environment=machine,
        )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = compare(tmp_path, "runs", "tracking=none")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "1000 runs of 7 papers" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5.0
    assert (tmp_path / "outputs" / "comparison" / "comparison.html").stat().st_size > 100_000


def test_nothing_but_damaged_files_is_status_1_and_an_empty_page(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "results.json").write_text('{"schema_version": 1,')
    done = compare(tmp_path, "runs")
    assert done.returncode == 1
    assert "runs/results.json is not valid JSON" in done.stderr
    assert "is not valid JSON" in (tmp_path / "outputs" / "comparison" / "comparison.md").read_text()


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    attack = '<script>alert("x")</script>'
    write_run(
        tmp_path / "runs",
        [exact(statement=attack, source=attack, reason=attack, verdict="not replicated")],
        title=attack,
    )
    assert compare(tmp_path, "runs", "tracking=none").returncode == 0
    page = (tmp_path / "outputs" / "comparison" / "comparison.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
