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

    Raises:
        UserError: results.json cannot be written (everything computed is in the cache and comes back at once).
    """
    from shared.report.document import write_json
    from shared.report.html import write_html
    from shared.report.tracking import log_wandb

    _write_files(run, folder, document)
    path = folder / "results.json"
    write_json(document, path)
    try:
        write_html(document, folder)
    except OSError as error:
        display.note(f"report.html could not be written ({error.strerror}); results.json holds everything")
    warning = log_wandb(document, folder, run.settings.tracking)
    if warning:
        display.note(warning)
    return path


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
