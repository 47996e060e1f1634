"""What a comparison of runs is made of."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.compare.load import Problem, Run

NOT_TESTED = "not tested"
_SCALES = ("reduced", "full", "smoke")  # which scale speaks for a claim that several were run at


@dataclass(frozen=True, eq=False)
class Cell:
    """One claim under one condition, from one run or several."""

    paper: str
    row: Mapping[str, Any]  # as in results.json; of pooled seeds, computed anew
    scale: str
    device: str
    commit: str
    configuration: str
    machines: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]  # the newest last
    variant: str = ""  # how its configuration differs from the usual one, where several were run
    note: str = ""  # how it was merged

    @property
    def claim(self) -> str:
        return str(self.row["id"])

    @property
    def verdict(self) -> str:
        return str(self.row["verdict"])

    @property
    def condition(self) -> tuple[str, str, str, str]:
        """What must be the same before commits, machines and configurations are compared."""
        return self.paper, self.claim, self.scale, self.device

    @property
    def started(self) -> str:
        return self.runs[-1].started


@dataclass(frozen=True)
class Disagreement:
    """Runs that were not put together, and why."""

    paper: str
    scale: str
    device: str
    reason: str
    claims: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All that the tables are made from."""

    runs: tuple[Run, ...]
    cells: tuple[Cell, ...]  # what holds now: of each machine the newest commit
    every: tuple[Cell, ...]  # earlier commits too
    disagreements: tuple[Disagreement, ...]
    problems: tuple[Problem, ...]

    @functools.cached_property
    def papers(self) -> dict[str, str]:
        """Titles by name, sorted."""
        return {
            run.paper: str(run.document.get("title") or run.paper)
            for run in sorted(self.runs, key=lambda run: run.paper)
        }

    @functools.cached_property
    def shown(self) -> tuple[Cell, ...]:
        """The cells of the table of claims: one that was not tested is left out where another run tested the claim."""
        return tuple(
            cell for cell in self.cells if cell.verdict != NOT_TESTED or cell is self.best[cell.paper, cell.claim]
        )

    @functools.cached_property
    def best(self) -> dict[tuple[str, str], Cell]:
        """The cell that speaks for each claim of each paper, in the order of the cells."""
        chosen: dict[tuple[str, str], Cell] = {}
        for cell in sorted(self.cells, key=self.rank):
            chosen.setdefault((cell.paper, cell.claim), cell)
        return {key: chosen[key] for key in dict.fromkeys((cell.paper, cell.claim) for cell in self.cells)}

    def rank(self, cell: Cell) -> tuple[Any, ...]:
        """Smaller speaks for a claim first: what was tested, the usual configuration, reduced scale, the device that most runs name."""
        scale = _SCALES.index(cell.scale) if cell.scale in _SCALES else len(_SCALES)
        return cell.verdict == NOT_TESTED, bool(cell.variant), scale, -self._uses[cell.paper, cell.device], cell.device

    @functools.cached_property
    def _uses(self) -> Counter[tuple[str, str]]:
        return Counter((run.paper, run.device) for run in self.runs)
