"""A project of its own for tests of the runner: the real ``run.py``, ``conf`` and ``shared``, and one toy paper."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Project:
    """A folder with a runnable copy of the suite."""

    folder: Path

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "run.py", *arguments],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
            # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            **options,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        with self.popen(*arguments) as process:
            out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def results(self, completed: subprocess.CompletedProcess[str]) -> dict[str, Any]:
        """The document behind the last line printed."""
        assert completed.stdout.strip(), completed.stderr
        return dict(json.loads((self.folder / completed.stdout.strip().splitlines()[-1]).read_text()))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    folder = tmp_path / "suite"
    folder.mkdir()
    for name in ("shared", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", folder)
    (folder / "papers").mkdir()
    shutil.copy(ROOT / "papers" / "__init__.py", folder / "papers")
    shutil.copytree(ROOT / "tests" / "toy", folder / "papers" / "toy")
    return Project(folder)


def claim(document: dict[str, Any], claim_id: str) -> dict[str, Any]:
    """One claim's row."""
    return next(row for row in document["claims"] if row["id"] == claim_id)
