"""What verdicts changed from one commit, or one folder of results, to another, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.compare.load import differences
from shared.compare.model import NOT_TESTED, Cell, Comparison
from shared.report import format as fmt

_MANY = 3  # config keys or packages named one by one


@dataclass(frozen=True)
class Change:
    """A verdict that changed."""

    old: Cell
    new: Cell
    why: str


def changes(comparison: Comparison) -> list[Change]:
    """Changed verdicts along the commits of each claim, scale and device, the newest last.

    A run is held against the last earlier commit on the same machine and in the same configuration, else against what comes nearest.
    """
    conditions: dict[tuple[str, ...], list[Cell]] = {}
    for cell in sorted(comparison.every, key=lambda cell: cell.started):
        conditions.setdefault(cell.condition, []).append(cell)
    found = []
    for cells in conditions.values():
        for place, cell in enumerate(cells):
            earlier = [other for other in cells[:place] if other.commit != cell.commit]
            before = max(earlier, key=lambda other: _nearness(other, cell), default=None)
            if before is not None and before.verdict != cell.verdict and _comparable(before, cell):
                found.append(Change(before, cell, why(before, cell)))
    return sorted(found, key=lambda change: (change.new.started, change.new.paper))


def folder_changes(old: Comparison, new: Comparison) -> tuple[list[Change], list[Cell], list[Cell]]:
    """Verdicts that changed between two folders of results, the claims that came and those that went."""
    both = [key for key in new.best if key in old.best and new.best[key].verdict != old.best[key].verdict]
    changed = [Change(old.best[key], new.best[key], why(old.best[key], new.best[key])) for key in both]
    came = [cell for key, cell in new.best.items() if key not in old.best]
    went = [cell for key, cell in old.best.items() if key not in new.best]
    return changed, came, went


def why(old: Cell, new: Cell) -> str:
    """What differs between two runs whose verdicts differ, the nearest cause first."""
    causes = [*_terms(old.row, new.row), *_outcome(old, new), *_circumstances(old, new)]
    if not causes:
        causes.append(f"the rules of judging changed from {old.commit} to {new.commit}")
    return "; ".join(causes)


def _nearness(other: Cell, cell: Cell) -> tuple[Any, ...]:
    shares_machine = not set(other.machines).isdisjoint(cell.machines)
    return shares_machine, other.configuration == cell.configuration, other.started


def _comparable(before: Cell, cell: Cell) -> bool:
    """A machine that cannot test a claim says nothing against another one that could."""
    return not set(before.machines).isdisjoint(cell.machines) or NOT_TESTED not in (before.verdict, cell.verdict)


def _terms(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Changes of the claim itself."""
    names = {
        "relation": "the relation",
        "unit": "the unit",
        "neutral": "the value of no effect",
        "evidence": "the evidence",
    }
    if fmt.stated_value(old) != fmt.stated_value(new):
        yield f"the stated number went from {fmt.stated(old)} to {fmt.stated(new)}"
    if _allowed(old) != _allowed(new):
        yield f"the tolerance went from {_allowed(old) or 'none'} to {_allowed(new) or 'none'}"
    for key, name in names.items():
        if old.get(key) != new.get(key):
            yield f"{name} went from {old.get(key)} to {new.get(key)}"


def _allowed(row: Mapping[str, Any]) -> str:
    return fmt.tolerance(row).partition(" (")[0]


def _outcome(old: Cell, new: Cell) -> Iterator[str]:
    """Changes of our number, and the new verdict's own reason."""
    here, there = old.row, new.row
    if (here.get("value") is None) != (there.get("value") is None):
        yield "there is a number now" if here.get("value") is None else "there is no number any more"
    elif fmt.ours(here) != fmt.ours(there):
        yield f"ours went from {fmt.ours(here)} to {fmt.ours(there)}"
    if here.get("n_seeds") != there.get("n_seeds") and here.get("n_seeds") and there.get("n_seeds"):
        yield f"{here['n_seeds']} seeds became {there['n_seeds']}"
    if there.get("reason") and there.get("reason") != here.get("reason"):
        yield str(there["reason"])


def _circumstances(old: Cell, new: Cell) -> Iterator[str]:
    """Changes of configuration, machine and libraries."""
    here, there = old.runs[-1], new.runs[-1]
    if old.configuration != new.configuration:
        reads = there.reads.get(str(new.row.get("experiment")))
        found = differences(here.config, there.config)
        keys = [key for key in found if not reads or key.split(".")[0] in reads]
        yield from _few(
            [f"{key} went from {_text(found[key][0])} to {_text(found[key][1])}" for key in keys], "config keys"
        )
    if set(old.machines).isdisjoint(new.machines):
        yield f"another machine ({old.machines[0]}, then {new.machines[0]})"
    versions = [dict(run.document["environment"].get("versions") or {}) for run in (here, there)]
    moved = differences(*versions)
    yield from _few([f"{name} {moved[name][0] or 'none'} to {moved[name][1] or 'none'}" for name in moved], "packages")


def _few(texts: Sequence[str], noun: str) -> Iterator[str]:
    yield from texts[:_MANY]
    if len(texts) > _MANY:
        yield f"{len(texts) - _MANY} more {noun} changed"


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:39] + "…"
