"""What was computed is kept: JSON values by a hash of everything that they depend on.

Writes go to a temporary name and are then renamed, so a killed run leaves whole entries only, and many processes may share one
folder: two writers of the same key write the same bytes. An entry carries a checksum; a corrupt one is set aside and recomputed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.files import write_whole
from shared.runner.environment import cpu_name, version
from shared.runner.paths import PAPERS, ROOT


def digest(value: Any) -> str:
    """A hash of a JSON-like value that does not depend on the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=True).encode()).hexdigest()[:32]


@functools.cache
def code_fingerprint(paper: str) -> str:
    """A hash of all that can change a number: the code of the paper and of ``shared`` (less what only shows results), libraries, CPU."""
    sources = [*(PAPERS / paper).rglob("*.py"), *(ROOT / "shared").rglob("*.py")]
    shows = {ROOT / "shared" / "report", ROOT / "shared" / "compare"}
    state = hashlib.sha256()
    for path in sorted(path for path in sources if shows.isdisjoint(path.parents)):
        state.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    # Another processor or library may round differently, and "same seed, same numbers" is promised for one machine.
    machine = [version("torch"), version("numpy"), version("timm"), platform.machine(), cpu_name()]
    state.update(json.dumps(machine).encode())
    return state.hexdigest()[:32]


class Cache:
    """A folder of entries ``<key>/value.json``, with room beside each value for the files that its computation keeps.

    Args:
        folder: where entries live; a temporary folder takes its place, with a note, where it cannot be written.
        force: read nothing, so that everything is computed anew.
    """

    def __init__(self, folder: Path, *, force: bool = False) -> None:
        self.force = force
        self.notes: list[str] = []
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / ".writable", b"")
        except OSError as error:
            self._note(f"the cache {folder} cannot be written ({error.strerror}): nothing of this run will be reused")
            self.folder = Path(tempfile.mkdtemp(prefix="papercheck-"))
        self._fresh: set[str] = set()  # written by this run: valid even under force

    def get(self, key: str) -> Any | None:
        """The value of ``key``, or None if there is none (or it was corrupt, which is noted and set aside)."""
        if self.force and key not in self._fresh:
            return None
        path = self.folder / key / "value.json"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._set_aside(path, type(error).__name__)
            return None
        try:
            entry = json.loads(text)
            if entry["checksum"] == digest(entry["value"]):
                return entry["value"]
            self._set_aside(path, "checksum differs")
        except (ValueError, KeyError, TypeError):
            self._set_aside(path, "not a whole entry")
        return None

    def put(self, key: str, value: Any) -> None:
        """Keep ``value``. A full or read-only disk is noted, never fatal: the number itself is not lost."""
        entry = json.dumps({"value": value, "checksum": digest(value)})
        try:
            folder = self.workdir(key)
            write_whole(folder / "value.json", entry.encode())
            self._fresh.add(key)
        except OSError as error:
            self._note(f"the cache {self.folder} cannot be written ({error.strerror}): this result will not be reused")

    def workdir(self, key: str) -> Path:
        """The folder of an entry, for checkpoints and files of the computation behind it."""
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def forget(self, key: str) -> None:
        """Drop an entry with its files, so that a forced run does not resume from a checkpoint."""
        shutil.rmtree(self.folder / key, ignore_errors=True)

    def _set_aside(self, path: Path, why: str) -> None:
        aside = path.with_suffix(".corrupt")
        try:
            path.replace(aside)
        except OSError:
            aside = path
        self._note(f"cache entry {aside.parent.name} was corrupt ({why}): set aside and recomputed")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def experiment_key(paper: str, experiment: str, dependencies: Mapping[str, Any]) -> str:
    """The cache key of one experiment or job."""
    return digest({"paper": paper, "experiment": experiment, "code": code_fingerprint(paper), **dependencies})
