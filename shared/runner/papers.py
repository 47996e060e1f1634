"""Papers are found by their folder: ``papers/<name>/claims.yaml`` makes a paper. Adding one touches no existing file."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from shared.claims import ClaimsFile, load_claims
from shared.errors import UserError, unknown
from shared.experiment import Experiment
from shared.runner.paths import CONF, PAPERS


@dataclass(frozen=True)
class PaperPackage:
    """A paper's folder, its claims and its experiments."""

    name: str
    folder: Path
    claims_file: ClaimsFile
    experiments: tuple[Experiment, ...]


def paper_names(papers: Path = PAPERS) -> list[str]:
    """The names of all papers, sorted."""
    return sorted(path.parent.name for path in papers.glob("*/claims.yaml"))


def load_paper(name: str) -> PaperPackage:
    """Import ``papers.<name>.experiments`` and read its claims.

    Raises:
        UserError: no such paper; a claim that no experiment settles or that two do; an experiment for a claim that does not exist.
    """
    if name not in paper_names():
        raise unknown("paper", name, paper_names())
    claims_file = load_claims(PAPERS / name / "claims.yaml")
    module = importlib.import_module(f"papers.{name}.experiments")
    marked = [getattr(value, "__experiment__", None) for value in vars(module).values()]
    experiments = [entry for entry in marked if isinstance(entry, Experiment)]
    _check_coverage(name, claims_file, experiments)
    experiments.sort(key=lambda entry: _cost(entry, claims_file))
    return PaperPackage(name, PAPERS / name, claims_file, tuple(experiments))


def _cost(entry: Experiment, claims_file: ClaimsFile) -> tuple[int, int]:
    """Counted and modelled claims first, what is measured or trained last; among equals the order of claims.yaml."""
    order = {claim.id: index for index, claim in enumerate(claims_file.claims)}
    claims = claims_file.by_id()
    ranks = {"exact": 0, "modelled": 0, "measured": 1, "trained": 2}
    rank = max((ranks[claims[claim].evidence] for claim in entry.claims), default=0)
    return rank, min((order[claim] for claim in entry.claims), default=len(order))


def _check_coverage(name: str, claims_file: ClaimsFile, experiments: Sequence[Experiment]) -> None:
    owner: dict[str, str] = {}
    known = claims_file.by_id()
    for entry in experiments:
        for claim_id in entry.claims:
            if claim_id not in known:
                raise UserError(
                    f"papers/{name}: experiment '{entry.name}' settles '{claim_id}', which claims.yaml does not list"
                )
            if claim_id in owner:
                raise UserError(
                    f"papers/{name}: both '{owner[claim_id]}' and '{entry.name}' settle the claim '{claim_id}'"
                )
            owner[claim_id] = entry.name
    for claim_id, claim in known.items():
        if claim_id not in owner and not claim.not_testable:
            raise UserError(
                f"papers/{name}: no experiment settles the claim '{claim_id}'; add one, or say why in `not_testable`"
            )


class PapersSearchPath(SearchPathPlugin):
    """Adds every ``papers/<name>/conf`` to Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for name in paper_names():
            folder = PAPERS / name / "conf"
            if folder.is_dir():
                search_path.append(provider=f"paper {name}", path=f"file://{folder}")


def register_search_path() -> None:
    """Tell Hydra where the papers keep their configs.

    Raises:
        UserError: two folders offer the same option (Hydra would silently take the first).
    """
    check_clashes([CONF, *(PAPERS / name / "conf" for name in paper_names())])
    Plugins.instance().register(PapersSearchPath)


def check_clashes(folders: list[Path]) -> None:
    """Refuse a config option that two folders offer.

    Raises:
        UserError: names both files.
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            option = path.relative_to(folder)
            if option in seen:
                raise UserError(
                    f"config option '{option.with_suffix('')}' exists twice, in {seen[option]} and in {path}; rename one"
                )
            seen[option] = path
