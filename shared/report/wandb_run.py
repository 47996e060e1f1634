"""The logging process of :mod:`shared.report.tracking`: reads one job from standard input, writes one W&B run, ends.

``python -m shared.report.wandb_run offline|online``. Status 0 when the run was written; otherwise the last line says why not.
"""

from __future__ import annotations

import json
import math
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from shared.report import format as fmt

_REACH_S, _INIT_S, _FINISH_S = 3.0, 8.0, 60.0  # to reach the server at all, to start a run, to upload
_CLAIM_COLUMNS = (
    *("id", "kind", "statement", "source", "evidence", "paper", "ours", "verdict", "reason", "paper_value", "value"),
    *("ci_low", "ci_high", "unit", "n_seeds", "suspicious", "control_ok", "experiment", "seconds"),
)


def main(mode: str) -> int:
    """Log the job from standard input; prints the reason and returns 1 when it fails."""
    try:
        log(json.load(sys.stdin), mode)
    except Exception as error:  # whatever W&B raises becomes one line for the run that started this
        print(" ".join(str(error).split()) or type(error).__name__, flush=True)
        return 1
    return 0


def log(job: Mapping[str, Any], mode: str) -> None:
    """Write the W&B run of one job (see :func:`shared.report.tracking._log`): of a result document, or of a comparison's tables."""
    import wandb

    document, folder = job.get("document"), Path(job["folder"])
    settings = wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        save_code=False,
        use_dot_wandb=False,
        symlink=False,
        init_timeout=_INIT_S,
        finish_timeout=_FINISH_S,
        finish_timeout_raises=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    if mode == "online":
        _reach(wandb.setup().settings.base_url)
    run = wandb.init(
        project=job["project"],
        group=job["group"],
        name=job["name"],
        id=job["id"],
        dir=str(folder),
        mode="online" if mode == "online" else "offline",
        resume="allow" if mode == "online" else None,
        config=_config(document) if document else job["facts"],
        settings=settings,
    )
    if Path(run.dir).resolve().is_relative_to(folder.resolve()) is False:
        raise OSError(f"W&B cannot write in {folder}: make the folder writable")
    if document:
        run.log(dict(_media(job, folder)))
        run.summary.update(_summary(document))
        _artifact(run, job, folder)
    else:
        run.log({name: _rows_table(rows) for name, rows in job["tables"].items() if rows})
        run.summary.update({f"verdicts/{verdict}": count for verdict, count in job["facts"]["verdicts"].items()})
    run.finish()


def _reach(url: str) -> None:
    """Raise OSError at once where no server answers: W&B itself would try again for as long as it may."""
    if getproxies():
        return  # what a proxy reaches cannot be told from here
    server = urlsplit(url)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname or "", port), timeout=_REACH_S).close()
    except OSError as error:
        raise OSError(f"{server.hostname} does not answer: {error.strerror or error}") from None


def _config(document: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("paper", "title", "scale", "device", "seed", "environment", "started", "schema_version")
    return {key: document.get(key) for key in keys} | {"config": document.get("config") or {}}


def _media(job: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """Everything that is logged in the one step of the run: tables, plots, pictures and the report itself."""
    import wandb

    document = job["document"]
    rows = [_claim_cells(row) for row in document.get("claims", [])]
    yield "claims", _table(_CLAIM_COLUMNS, rows)
    for item in document.get("measurements", []):
        if any(item.get("rows", [])):
            yield f"tables/{_key(item)}", _rows_table(item["rows"])
    for key, svg in job["plots"].items():
        yield f"plots/{key}", wandb.Html(svg)
    for item in document.get("pictures", []):
        path = folder / str(item.get("file"))
        if path.is_file():
            yield f"pictures/{_key(item)}", wandb.Image(str(path), caption=item.get("title"))
    report = folder / "report.html"
    if report.is_file():
        yield "report", wandb.Html(report.read_text(encoding="utf-8"), inject=False)


def _summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of each claim and counts of verdicts, which W&B shows as columns over many runs."""
    summary: dict[str, Any] = {f"verdicts/{verdict}": count for verdict, count in fmt.counts(document).items()}
    summary["seconds"] = document.get("seconds")
    for row in document.get("claims", []):
        for key in ("value", "ci_low", "ci_high", "paper_value", "verdict"):
            if row.get(key) is not None:
                summary[f"claims/{row['id']}/{key}"] = row[key]
    return summary


def _artifact(run: Any, job: Mapping[str, Any], folder: Path) -> None:
    """results.json and report.html as an artifact; copies inside the W&B run, since a later run may replace the files."""
    import wandb

    files = [path for path in (folder / "results.json", folder / "report.html") if path.is_file()]
    if not files:
        return
    kept = Path(run.dir).parent / "artifact"
    kept.mkdir(exist_ok=True)
    artifact = wandb.Artifact(f"results-{job['name']}".replace("/", "-"), type="results")
    for path in files:
        artifact.add_file(str(shutil.copy2(path, kept / path.name)), policy="immutable", skip_cache=True)
    run.log_artifact(artifact)


def _claim_cells(row: Mapping[str, Any]) -> list[Any]:
    values = dict(row) | {
        "paper": fmt.stated(row),
        "ours": fmt.ours(row),
        "paper_value": json.dumps(fmt.stated_value(row)),
        "control_ok": (row.get("control") or {}).get("ok"),
    }
    return [values.get(column) for column in _CLAIM_COLUMNS]


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A W&B table of rows by column name."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _table(names, [[row.get(name) for name in names] for row in rows])


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """A W&B table. Its columns have one type each: one with mixed values is written as text."""
    import wandb

    kinds = [{type(value) for value in column if value is not None} for column in zip(*rows, strict=True)]
    mixed = [not (kind <= {int, float} or len(kind) == 1) or bool(kind & {list, dict}) for kind in kinds]
    cells = [[_cell(value, text) for value, text in zip(row, mixed, strict=True)] for row in rows]
    return wandb.Table(columns=list(columns), data=cells, allow_mixed_types=False)


def _cell(value: Any, as_text: bool) -> Any:
    if value is None:
        return None
    if as_text:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and math.isfinite(value) else value


def _key(item: Mapping[str, Any]) -> str:
    return f"{item.get('experiment')}/{item.get('name')}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
