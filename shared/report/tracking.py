"""A finished run in Weights & Biases: a mirror of the result document, never a condition of the run.

Names: ``group`` is the paper, ``name`` is paper-device-scale-seed, and the ``id`` is derived from both and from when the run started, so
that the same result logged twice is one W&B run. The logging happens in a process of its own (:mod:`shared.report.wandb_run`) with no
terminal to ask and a time limit: whatever W&B does there, the run that was just finished goes on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.report.document import plain
from shared.report.plots import measurement_svg

MODES = ("none", "offline", "online")
PROJECT = "papercheck"
_LIMIT_S = {"offline": 60.0, "online": 90.0}  # offline takes about 2 s; online may upload pictures over a slow line
_SPARE_BYTES = 8 * 1024**2  # W&B's own log and tables, on top of the copies of report and pictures
_ROOT = Path(__file__).resolve().parents[2]


def log_wandb(document: Mapping[str, Any], folder: Path | str, mode: str = "offline") -> str | None:
    """Log a result to W&B below ``folder/wandb``; ``folder`` is the run's, with results.json, report.html and the pictures.

    mode: ``offline`` (synchronise later with ``wandb sync``), ``online`` (falls back to offline when the server cannot be reached
    or there is no account), ``none``. Returns a warning of one sentence when something did not go as asked, and never raises.
    """

    def job() -> dict[str, Any]:
        return {"document": plain(document), "plots": _plots(document), **run_names(document)}

    return _guarded(job, Path(folder).resolve(), mode)


def log_comparison(
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    facts: Mapping[str, Any],
    folder: Path | str,
    mode: str = "offline",
) -> str | None:
    """Log the tables of a comparison as one W&B run below ``folder/wandb``: what a W&B report over many runs can be built on.

    tables: rows by the name of the table. facts: what was compared; it becomes the run's config. Otherwise as :func:`log_wandb`.
    """
    digest = hashlib.sha256(json.dumps([facts, tables], sort_keys=True, default=str).encode()).hexdigest()
    names = {"group": "comparison", "name": f"comparison-{digest[:6]}", "id": digest[:12]}
    return _guarded(lambda: {"tables": tables, "facts": facts, **names}, Path(folder).resolve(), mode)


def _guarded(make_job: Callable[[], dict[str, Any]], folder: Path, mode: str) -> str | None:
    """Log a job in a mode; whatever happens becomes a warning of one sentence."""
    if mode == "none":
        return None
    if mode not in MODES:
        return f"nothing was logged to W&B: unknown mode '{mode}', choose one of: {', '.join(MODES)}"
    try:
        return _log(make_job, folder, mode)
    except Exception as error:  # tracking never fails a run
        return f"nothing was logged to W&B: {_one_line(error)}"


def run_names(document: Mapping[str, Any]) -> dict[str, str]:
    """``group``, ``name`` and ``id`` of the W&B run of a result."""
    paper = str(document.get("paper"))
    name = "-".join(str(document.get(key)) for key in ("paper", "device", "scale", "seed"))
    commit = (document.get("environment") or {}).get("commit")
    digest = hashlib.sha256(f"{name} {document.get('started')} {commit}".encode()).hexdigest()
    return {"group": paper, "name": name, "id": digest[:12]}


def _log(make_job: Callable[[], dict[str, Any]], folder: Path, mode: str) -> str | None:
    if importlib.util.find_spec("wandb") is None:
        return "nothing was logged to W&B: the package wandb cannot be imported; install it, or choose tracking=none"
    job = {**make_job(), "folder": str(folder), "project": PROJECT}
    problem = _lack_of_space(folder, job)
    if problem:
        return f"nothing was logged to W&B: {problem}"
    asked_online = mode == "online"
    if asked_online:
        problem = _child(job, "online", folder)
        if problem is None:
            return None
        for unfinished in folder.glob(f"wandb/run-*-{job['id']}"):  # or the same run would be synchronised twice
            shutil.rmtree(unfinished, ignore_errors=True)
    failure = _child(job, "offline", folder)
    if failure:
        return f"nothing was logged to W&B: {failure}"
    where = next(iter(sorted(folder.glob(f"wandb/offline-run-*-{job['id']}"), reverse=True)), folder / "wandb")
    return (
        f"W&B was logged offline, since online failed ({problem}): upload with 'wandb sync {where}'"
        if asked_online
        else None
    )


def _child(job: Mapping[str, Any], mode: str, folder: Path) -> str | None:
    """Run the logging process; None when it went well, else what went wrong."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        "WANDB_DATA_DIR": str(folder / "wandb"),  # where artifacts are staged; the defaults are in the home folder
        "WANDB_CACHE_DIR": str(folder / "wandb" / "cache"),
        "WANDB_MODE": mode,
    }
    with subprocess.Popen(
        [sys.executable, "-m", "shared.report.wandb_run", mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=environment,
        start_new_session=True,  # no terminal to prompt on, and one group to end with all that W&B started
    ) as process:
        try:
            output, errors = process.communicate(json.dumps(job).encode(), timeout=_LIMIT_S[mode])
        except subprocess.TimeoutExpired:
            return f"it took longer than {_LIMIT_S[mode]:.0f} s"
        finally:
            _end(process)
    if process.returncode == 0:
        return None
    lines = (output.decode(errors="replace").strip() or errors.decode(errors="replace").strip()).splitlines()
    return _one_line(lines[-1] if lines else f"the logging process ended with status {process.returncode}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the logging process and W&B's service, which otherwise could outlive it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return  # all ended by themselves


def _plots(document: Mapping[str, Any]) -> dict[str, str]:
    """SVG of each measurement that has a plot, by experiment/name; report.html says which could not be drawn."""
    plots = {}
    for item in document.get("measurements", []):
        try:
            plot = measurement_svg(item)
        except Exception:
            continue
        if plot:
            plots[f"{item.get('experiment')}/{item.get('name')}"] = plot
    return plots


def _lack_of_space(folder: Path, job: Mapping[str, Any]) -> str | None:
    """W&B's service writes in the background and does not report a full disk, so ask before."""
    files = [folder / "report.html", folder / "results.json"]
    files += [folder / str(item.get("file")) for item in job.get("document", {}).get("pictures", [])]
    sizes = sum(path.stat().st_size for path in files if path.is_file())
    needed = 2 * sizes + 2 * len(json.dumps(job)) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return f"{folder} has {free / 1024**2:.0f} MiB free and {needed / 1024**2:.0f} MiB are needed; free some space"


def _one_line(problem: object) -> str:
    text = " ".join(str(problem).split()) or type(problem).__name__
    return (text if len(text) <= 200 else text[:199] + "…").rstrip(".")
