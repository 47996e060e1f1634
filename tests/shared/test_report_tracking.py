"""Weights & Biases: a real offline run read back from its file, and everything that may go wrong."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.report import tracking
from shared.report.document import write_json
from shared.report.html import write_html
from shared.report.tracking import log_wandb, run_names
from tests.shared.test_report_document import make_document
from tests.shared.test_report_html import PNG

wandb_records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
NO_SERVER = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches a server or the settings of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_BASE_URL", NO_SERVER)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def make_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """A run's folder as the runner leaves it."""
    document = make_document(**changes)
    (folder / "pictures").mkdir(parents=True)
    (folder / "pictures" / "room.png").write_bytes(PNG)
    write_html(document, folder)
    write_json(document, folder / "results.json")
    return document


def records(path: Path) -> Iterator[Any]:
    """W&B's records of a run: its protobuf messages in LevelDB's log format after a header of seven bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, message = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        message += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_records.Record()
            record.ParseFromString(message)
            message = b""
            yield record


def only_run(folder: Path) -> Path:
    (path,) = folder.glob("wandb/offline-run-*")
    return path


def test_an_offline_run_holds_everything(tmp_path: Path) -> None:
    document = make_run(tmp_path / "run")
    assert log_wandb(document, tmp_path / "run") is None
    run = only_run(tmp_path / "run")
    found = list(records(next(run.glob("*.wandb"))))
    kinds = {record.WhichOneof("record_type") for record in found}
    assert {"run", "history", "summary", "artifact", "exit"} <= kinds

    (started,) = [record.run for record in found if record.WhichOneof("record_type") == "run"][:1]
    names = run_names(document)
    assert (started.run_group, started.display_name, started.run_id) == ("m3vit", "m3vit-zcu104-reduced-0", names["id"])
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["config"] == document["config"]
    assert config["environment"]["commit"] == "9f2c61e0b7a4d5"
    assert (config["device"], config["scale"], config["seed"]) == ("zcu104", "reduced", 0)

    summary: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
            }
    assert summary["verdicts/replicated"] == 4
    assert summary["claims/energy_vs_naive/value"] == 9.2344
    assert summary["claims/multi_gate_beats_single/ci_low"] == 0.31
    assert summary["claims/gpu_energy/verdict"] == "not tested"
    assert "claims/gpu_energy/value" not in summary

    (step,) = [record.history for record in found if record.WhichOneof("record_type") == "history"]
    logged: dict[str, Any] = {}
    for item in step.item:
        key, *inner = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        logged.setdefault(key, {})
        logged[key] = logged[key] | {inner[0]: value} if inner else value
    assert {"claims", "report", "pictures/synthroom/room", "plots/flops/macs", "tables/memory/buffers"} <= set(logged)
    assert logged["report"]["_type"] == "html-file"
    table = json.loads((run / "files" / logged["claims"]["path"]).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["id"] for row in rows] == [claim["id"] for claim in document["claims"]]
    assert rows[3]["ours"] == "1.4 points [0.3, 2.5]"
    assert rows[3]["control_ok"] is False
    assert rows[6]["value"] is None
    assert "<svg" in (run / "files" / logged["plots/flops/macs"]["path"]).read_text(encoding="utf-8")

    (artifact,) = [
        record.artifact
        for record in found
        if record.WhichOneof("record_type") == "artifact" and record.artifact.type == "results"
    ]
    contents = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
    assert set(contents) == {"results.json", "report.html"}
    assert contents["results.json"].read_bytes() == (tmp_path / "run" / "results.json").read_bytes()
    assert contents["results.json"].is_relative_to(run)  # a copy: a later run may replace the file


def test_offline_logging_takes_seconds_and_writes_only_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in [name for name in os.environ if name.startswith("XDG_")]:
        monkeypatch.delenv(name)
    document = make_run(tmp_path / "run")
    started = time.monotonic()
    assert log_wandb(document, tmp_path / "run", "offline") is None
    assert time.monotonic() - started < 15  # about 1.5 s on a free core
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert "wandb" not in sys.modules or sys.modules["wandb"].run is None


def test_the_same_result_is_the_same_run_and_another_is_not() -> None:
    first = run_names(make_document())
    assert run_names(make_document()) == first
    for changes in ({"seed": 1}, {"device": "a100"}, {"scale": "full"}, {"started": "2026-03-02T00:00:00+00:00"}):
        assert run_names(make_document(**changes))["id"] != first["id"]
    assert run_names(make_document(seed=7))["name"] == "m3vit-zcu104-reduced-7"


def test_none_writes_nothing_and_an_unknown_mode_is_a_warning(tmp_path: Path) -> None:
    assert log_wandb(make_document(), tmp_path, "none") is None
    warning = log_wandb(make_document(), tmp_path, "always")
    assert warning == "nothing was logged to W&B: unknown mode 'always', choose one of: none, offline, online"
    assert list(tmp_path.iterdir()) == []


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)
    warning = log_wandb(make_document(), tmp_path)
    assert warning is not None
    assert "wandb cannot be imported" in warning


def test_with_a_package_that_breaks_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "wandb.py").write_text("raise ImportError('libfoo is missing')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    assert log_wandb(make_document(), tmp_path) == "nothing was logged to W&B: libfoo is missing"


@pytest.mark.parametrize(
    ("key", "problem"),
    [("a" * 40, "127.0.0.1 does not answer: Connection refused"), (None, "127.0.0.1 does not answer")],
)
def test_online_without_a_network_falls_back_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, problem: str
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    document = make_run(tmp_path / "run")
    started = time.monotonic()
    warning = log_wandb(document, tmp_path / "run", "online")
    assert time.monotonic() - started < 25
    assert warning is not None
    assert problem in warning
    assert warning.endswith(f"upload with 'wandb sync {only_run(tmp_path / 'run')}'")
    assert list(tmp_path.glob("run/wandb/run-*")) == []  # no half of an online run


def test_a_folder_that_cannot_take_the_run(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("in the way")
    warning = log_wandb(make_document(), tmp_path)
    assert warning is not None
    assert warning.startswith("nothing was logged to W&B: ")
    assert "\n" not in warning
    assert log_wandb(make_document(), tmp_path / "none") is not None


def test_a_full_disk_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 1024**2))
    warning = log_wandb(make_document(), tmp_path)
    assert warning == f"nothing was logged to W&B: {tmp_path} has 2 MiB free and 8 MiB are needed; free some space"
    assert list(tmp_path.iterdir()) == []


def test_a_logging_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "wandb.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "slow"))
    monkeypatch.setitem(tracking._LIMIT_S, "offline", 3.0)
    assert log_wandb(make_document(), tmp_path) == "nothing was logged to W&B: it took longer than 3 s"
    grandchild = int((tmp_path / "pid").read_text())
    for _ in range(50):
        try:
            state = Path(f"/proc/{grandchild}/stat").read_text().split()[2]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the service outlived the logging process")


def test_a_document_that_cannot_be_logged_is_a_warning(tmp_path: Path) -> None:
    warning = log_wandb(make_document(seconds=float("nan")), tmp_path)
    assert warning is not None
    assert "nan in seconds" in warning
