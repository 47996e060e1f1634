"""Where a run's results go: results.json first, then what people look at. Only results.json may fail a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.experiment import Artifact, Picture
from shared.runner.execute import Display, Run


def write_results(run: Run, document: dict[str, Any], folder: Path, display: Display) -> Path:
    """Write results.json, pictures, checkpoints, report.html and the W&B run; return the path of results.json.

    In a sweep report.html and the W&B run are made in the background, while the next run computes.

    Raises:
        UserError: results.json cannot be written (everything computed is in the cache and comes back at once).
    """
    from shared.report.document import write_json

    _write_files(run, folder, document)
    path = folder / "results.json"
    write_json(document, path)
    display.sink(show_results, document, folder, run.settings.tracking)
    return path


def show_results(document: dict[str, Any], folder: Path, tracking: str) -> list[str]:
    """Make report.html and the W&B run of a finished run; notes of what could not be made."""
    from shared.report.html import write_html
    from shared.report.tracking import log_wandb

    notes = []
    try:
        write_html(document, folder)
    except (OSError, UserError) as error:
        notes.append(f"report.html could not be written ({error}); results.json holds everything")
    if warning := log_wandb(document, folder, tracking):
        notes.append(warning)
    return notes


def _write_files(run: Run, folder: Path, document: dict[str, Any]) -> None:
    try:
        for experiment in run.experiments:
            for exhibit in experiment.exhibits:
                if isinstance(exhibit, Picture):
                    (folder / "pictures").mkdir(exist_ok=True)
                    (folder / "pictures" / f"{exhibit.name}.png").write_bytes(exhibit.png)
                elif isinstance(exhibit, Artifact):
                    if not exhibit.path.exists():
                        document["notes"].append(
                            f"checkpoint {exhibit.name} is gone from the cache; force=true makes it anew"
                        )
                        continue
                    (folder / "checkpoints").mkdir(exist_ok=True)
                    shutil.copyfile(exhibit.path, folder / "checkpoints" / exhibit.name)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}); what was computed is in the cache: "
            "free some space or choose another folder with out=FOLDER, and the same command ends in seconds"
        ) from error
