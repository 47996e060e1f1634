"""What the process that started a sweep does when a run in another process or on another machine ends."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def run_ended(config: DictConfig, folder: Path, error: BaseException | None) -> None:
    """Show the lines of a run that wrote ``folder``; where it died, write ``error`` rows for its claims first.

    Args:
        config: the composed config of the run, with Hydra's own node.
        folder: where the run writes.
        error: what the launcher knows of its death; None if it ended by itself.
    """
    from shared.errors import UserError
    from shared.report.document import load_results, write_json
    from shared.runner.sweep import current_sweep

    if error is not None and not (folder / "results.json").exists():
        write_json(died(config, folder, error), folder / "results.json")
    sweep = current_sweep()
    if sweep is None:
        return
    try:
        document = load_results(folder / "results.json")
    except UserError:
        pass  # bad input, which the run has said; the summary counts it as a run without a result
    else:
        sweep.display(f"{document['paper']} seed {document['seed']}").finish(document)
    sweep.advance()


def died(config: DictConfig, folder: Path, error: BaseException) -> dict[str, Any]:
    """A result document in which every claim that the run could have settled is an error: nobody is left who could say more."""
    from shared.experiment import NotTested
    from shared.judge import Failure, Situation, judge
    from shared.runner.document import build_document
    from shared.runner.execute import Run
    from shared.runner.papers import load_paper
    from shared.runner.settings import read_settings, select_claims

    container: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]), resolve=True
    )
    container["out"] = str(folder)
    settings = read_settings(container)
    paper = load_paper(settings.paper)
    claims = select_claims(paper.claims_file.by_id(), settings.claims)
    run = Run(settings, paper, claims, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    failure = Failure(f"the process of this run died ({first_line}); the same command goes on from its cache")
    for claim in claims:
        outcome = NotTested(claim.id, claim.not_testable) if claim.not_testable else failure
        run.outcomes[claim.id] = outcome
        run.judgements[claim.id] = judge(claim, outcome, Situation(settings.scale, settings.device))
    return build_document(run, container)
