"""One run from a composed config to its results: experiments, verdicts, controls, sensitivity, sinks."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shared.claims import Claim
from shared.errors import UserError
from shared.experiment import Experiment, NotTested
from shared.files import write_whole
from shared.hardware.device import load_device
from shared.judge import Failure, Judgement, Situation, Verdict, judge
from shared.runner.cache import Cache
from shared.runner.context import ProgressDisplay, RunContext
from shared.runner.document import build_document, claim_row
from shared.runner.experiments import ExperimentRun, Outcome, run_experiment
from shared.runner.papers import PaperPackage, load_paper
from shared.runner.settings import Config, Settings, read_settings, select_claims, with_overrides


class Display(ProgressDisplay, Protocol):
    """Where the run shows itself while it goes on."""

    def claim(self, row: Mapping[str, Any]) -> None:
        """A claim was settled."""

    def note(self, text: str) -> None:
        """Something that the user should know."""

    def sink(self, function: Callable[..., list[str]], *arguments: Any) -> None:
        """Run what only shows results, now or in the background, and show the notes that it returns."""


@dataclass
class Run:
    """All that a run knows when it ends."""

    settings: Settings
    paper: PaperPackage
    claims: list[Claim]
    started: str
    experiments: list[ExperimentRun] = field(default_factory=list)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    judgements: dict[str, Judgement] = field(default_factory=dict)
    controls: dict[str, dict[str, Any]] = field(default_factory=dict)
    sensitivity: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def execute(config: Config, display: Display) -> tuple[Run, dict[str, Any]]:
    """Run what ``config`` asks for and return the run with its result document.

    Raises:
        UserError: bad input, before anything is computed.
    """
    clock = time.perf_counter()
    settings = read_settings(config)
    paper = load_paper(settings.paper)
    load_device(config["device"])
    claims = select_claims(paper.claims_file.by_id(), settings.claims)
    _check_controls(config, paper, claims)
    cache = Cache(settings.cache, force=settings.force)
    context = RunContext(
        paper=paper.name,
        seed=settings.seed,
        seeds=settings.seeds,
        scale=settings.scale,
        published={name: entry.value for name, entry in paper.claims_file.published.items()},
        threads=settings.threads,
        workers=settings.workers,
        cache=cache,
        display=display,
    )
    run = Run(settings, paper, claims, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    wanted = {claim.id for claim in claims}
    situation = Situation(settings.scale, settings.device)

    for claim in claims:
        if claim.not_testable:
            run.outcomes[claim.id] = NotTested(claim.id, claim.not_testable)
            run.judgements[claim.id] = judge(claim, run.outcomes[claim.id], situation)
    by_id = {claim.id: claim for claim in claims}

    def settled(experiment: ExperimentRun, claim_id: str) -> None:
        if claim_id in wanted and claim_id not in run.outcomes:
            run.outcomes[claim_id] = experiment.outcomes[claim_id]
            run.judgements[claim_id] = judge(by_id[claim_id], run.outcomes[claim_id], situation)
            display.claim(claim_row(run, by_id[claim_id], experiment))

    for entry in paper.experiments:
        shows_only = not entry.claims and settings.claims is None  # tables and pictures that settle nothing
        if shows_only or wanted.intersection(entry.claims):
            run.experiments.append(run_experiment(entry, config, context, settled))
    if settings.control:
        run.controls = _run_controls(config, run, context, situation)
    if settings.sensitivity:
        from shared.runner.sensitivity import run_sensitivity, sentence

        run.sensitivity = run_sensitivity(
            config, lambda claim_id: _experiment_of(paper, claim_id), claims, context, situation, run.outcomes
        )
        run.notes += [sentence(claim_id, rows) for claim_id, rows in run.sensitivity.items() if rows]
    run.notes += cache.notes
    run.seconds = time.perf_counter() - clock
    return run, build_document(run, config)


def _check_controls(config: Config, paper: PaperPackage, claims: list[Claim]) -> None:
    """A control that changes nothing its experiment reads would be a check that cannot fail.

    Raises:
        UserError: names the claim and the key.
    """
    for claim in claims:
        if claim.control is None or claim.not_testable:
            continue
        with_overrides(config, claim.control.set, f"papers/{paper.name}: the control of '{claim.id}'")
        reads = _experiment_of(paper, claim.id).config
        for key in claim.control.set:
            if key.split(".")[0] not in reads:
                raise UserError(
                    f"papers/{paper.name}: the control of '{claim.id}' sets '{key}', which its experiment does not read; "
                    f"it reads: {', '.join(reads)}"
                )


_RANK = {Verdict.NOT_REPLICATED: 0, Verdict.DIRECTION: 1, Verdict.REPLICATED: 2}


def _run_controls(config: Config, run: Run, context: RunContext, situation: Situation) -> dict[str, dict[str, Any]]:
    """With the paper's idea off, every claim must fail, or at least do worse than with it. ``ok`` is None where untested."""
    results: dict[str, dict[str, Any]] = {}
    for claim in run.claims:
        if claim.control is None or claim.not_testable:
            continue
        off = with_overrides(config, claim.control.set, f"the control of '{claim.id}'")
        outcome = run_experiment(_experiment_of(run.paper, claim.id), off, context, _ignore).outcomes[claim.id]
        verdict = judge(claim, outcome, situation).verdict
        results[claim.id] = {
            "set": claim.control.set,
            "means": claim.control.means,
            "value": None if isinstance(outcome, NotTested | Failure) else outcome.value,
            "verdict": str(verdict),
            "reason": outcome.reason if isinstance(outcome, NotTested | Failure) else "",
            "ok": None
            if verdict not in _RANK
            else _RANK[verdict] == 0 or _RANK[verdict] < _RANK.get(run.judgements[claim.id].verdict, 0),
        }
    return results


def _ignore(run: ExperimentRun, claim: str) -> None:
    """A control's claims are not shown one by one."""


def _experiment_of(paper: PaperPackage, claim_id: str) -> Experiment:
    return next(entry for entry in paper.experiments if claim_id in entry.claims)


def exit_status(run: Run) -> int:
    """0: everything asked for ran, whatever the verdicts. 1: an experiment broke, or ``strict`` and a claim is not replicated."""
    verdicts = {judgement.verdict for judgement in run.judgements.values()}
    if Verdict.ERROR in verdicts or (run.settings.strict and Verdict.NOT_REPLICATED in verdicts):
        return 1
    return 0


def results_folder(folder: Path) -> Path:
    """Make the output folder and see that it can be written, before anything is computed.

    Raises:
        UserError: with the folder and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"cannot write to the output folder {folder} ({error.strerror}); choose another with out=FOLDER"
        ) from error
    return folder
