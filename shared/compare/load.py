"""Finds and reads finished runs. A file that cannot be read is named and skipped; the others are compared all the same."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.report import format as fmt
from shared.report.document import load_results

# Folders that hold copies of results or nothing of ours; hidden folders (the cache) are left out too.
_SKIPPED = {"wandb", "checkpoints", "pictures", "comparison"}
# What may differ between two runs of the same configuration: which part was run, how it was spread, where results go
# (and what a scale asks of a cluster).
_BOOKKEEPING = frozenset(
    (
        "claims",
        "seed",
        "force",
        "control",
        "sensitivity",
        "strict",
        "threads",
        "workers",
        "tracking",
        "out",
        "cache",
        "paper",
    )
)
_NUMBERS = ("value", "ci_low", "ci_high", "seconds")


@dataclass(frozen=True, eq=False)
class Run:
    """One finished run: its document, and what tells it from others."""

    path: Path
    document: Mapping[str, Any]

    @property
    def paper(self) -> str:
        return str(self.document["paper"])

    @property
    def device(self) -> str:
        return str(self.document["device"])

    @property
    def scale(self) -> str:
        return str(self.document["scale"])

    @property
    def seed(self) -> int:
        return int(self.document["seed"])

    @property
    def started(self) -> str:
        return str(self.document.get("started") or "")

    @cached_property
    def machine(self) -> str:
        return fmt.machine(self.document)

    @cached_property
    def commit(self) -> str:
        """The commit in ten digits, with a mark where the tree had local changes."""
        environment = self.document["environment"]
        return str(environment.get("commit") or "unknown")[:10] + (
            " + local changes" if environment.get("dirty") else ""
        )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration without what may differ between two runs that are to be merged."""
        kept = {key: value for key, value in self.document["config"].items() if key not in _BOOKKEEPING}
        if isinstance(kept.get("scale"), Mapping):
            kept["scale"] = {key: value for key, value in kept["scale"].items() if key != "resources"}
        return kept

    @cached_property
    def sections(self) -> dict[str, str]:
        """A hash of each section of the configuration."""
        return {key: _digest(value) for key, value in self.config.items()}

    @cached_property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """The sections that each experiment reads, where the run says so."""
        return {
            str(entry["name"]): (*entry["reads"], "scale")
            for entry in self.document.get("experiments") or []
            if isinstance(entry, Mapping) and isinstance(entry.get("reads"), list)
        }

    def conditions(self, experiment: str | None = None) -> str:
        """The scale, and whether the claims of an experiment come from a folder of the user's: other data are another experiment."""
        own = bool((self.config.get("data") or {}).get("root"))
        if own and (experiment not in self.reads or "data" in self.reads[experiment]):
            return f"{self.scale} on data.root"
        return self.scale

    def configuration(self, experiment: str | None = None) -> str:
        """A hash of the configuration behind the claims of one experiment, of the whole run where it is not known which part counts."""
        keys = sorted(self.sections) if experiment not in self.reads else sorted(set(self.reads[experiment]))
        return _digest([(key, self.sections.get(key)) for key in keys])


@dataclass(frozen=True)
class Problem:
    """A file that was skipped, and why, in one sentence."""

    path: Path
    sentence: str


def load_runs(places: Sequence[Path | str]) -> tuple[list[Run], list[Problem]]:
    """The runs in files and folders (at any depth), each once, by when they started.

    Raises:
        UserError: a place that does not exist, or none of the places holds a result or a damaged one.
    """
    runs: list[Run] = []
    problems: list[Problem] = []
    for path, named in _files(places):
        try:
            if not named and path.name != "results.json" and not _looks_like_result(path):
                continue
            runs.append(Run(path, _checked(load_results(path), path)))
        except UserError as error:
            problems.append(Problem(path, str(error)))
    if not runs and not problems:
        asked = ", ".join(str(place) for place in places)
        raise UserError(f"no results.json in {asked}: give folders of finished runs, such as outputs/")
    return sorted(_once(runs), key=lambda run: (run.started, str(run.path))), problems


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections as dotted keys with plain values."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, None where a side has no such key."""
    left, right = dict(flat(one)), dict(flat(other))
    return {
        key: (left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    }


def _files(places: Sequence[Path | str]) -> Iterator[tuple[Path, bool]]:
    """Candidate files in a fixed order, and whether the user named the file itself."""
    seen: set[Path] = set()
    for place in map(Path, places):
        if not place.exists():
            raise UserError(f"there is no {place}: give folders of finished runs, such as outputs/")
        found = [place] if place.is_file() else sorted(_walk(place))
        for path in found:
            if path.resolve() not in seen:
                seen.add(path.resolve())
                yield path, place.is_file()


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith(".")]
        yield from (Path(parent, name) for name in files if name.endswith(".json") and not name.startswith("."))


def _looks_like_result(path: Path) -> bool:
    """Whether a JSON file of another name is a result, whole or cut off: ours begin with the schema version and the paper."""
    with path.open("rb") as file:
        head = file.read(200)
    return b'"schema_version"' in head and b'"paper"' in head


def _checked(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """The document, when all that is computed with has the right type."""
    for row in document["claims"]:
        wrong = [key for key in _NUMBERS if not isinstance(row.get(key), int | float | None) or row.get(key) is True]
        if wrong:
            raise UserError(
                f"{path}: '{wrong[0]}' of the claim '{row['id']}' is not a number; run the paper again to write it anew"
            )
    return document


def _once(runs: Sequence[Run]) -> list[Run]:
    """Runs without exact copies of one another (a reference result is often a copy of a run in outputs)."""
    kept: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        outcome = [(row["id"], row["verdict"], row.get("value")) for row in run.document["claims"]]
        identity = (run.paper, run.device, run.scale, run.seed, run.started, run.commit, run.machine, tuple(outcome))
        kept.setdefault(identity, run)
    return list(kept.values())


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
