"""Run one experiment: hand it its config and context, collect what it yields, keep that in the cache."""

from __future__ import annotations

import base64
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from shared.errors import UserError
from shared.experiment import Artifact, Experiment, Measurement, NotTested, Picture, Plot, Result, Table
from shared.judge import Failure
from shared.runner.cache import experiment_key
from shared.runner.context import RunContext
from shared.runner.environment import gpu_names

Outcome = Measurement | NotTested | Failure


@dataclass
class ExperimentRun:
    """What one experiment gave."""

    name: str
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # from the experiment's start to each claim
    exhibits: list[Table | Picture | Artifact] = field(default_factory=list)
    total_seconds: float = 0.0
    from_cache: bool = False
    problem: str = ""  # why it ended early: a sentence for the user, or the traceback of our own error


def run_experiment(
    entry: Experiment, config: Mapping[str, Any], context: RunContext, on_outcome: Callable[[ExperimentRun, str], None]
) -> ExperimentRun:
    """Run ``entry``, or read its results from the cache.

    Args:
        entry: the experiment.
        config: the whole resolved config; the experiment sees only the sections that it names.
        context: what the experiment may use beside its config.
        on_outcome: called with the run so far and the id of each claim as it is settled.

    A failing experiment settles its remaining claims with a :class:`Failure`; it never raises, interrupts excepted.
    """
    run = ExperimentRun(entry.name)
    if entry.gpu and not gpu_names():
        for claim in entry.claims:
            _settle(run, claim, NotTested(claim, "needs an NVIDIA GPU, this machine has none"), 0.0, on_outcome)
        return run
    missing = [name for name in entry.config if name not in config]
    if missing:
        raise UserError(
            f"experiment '{entry.name}' reads the config section '{missing[0]}', which this paper's config does not have"
        )
    sections = {name: config[name] for name in entry.config}
    key = experiment_key(context.paper, entry.name, _dependencies(entry, sections, context))
    kept = context.cache.get(key)
    if kept is not None:
        run.from_cache = True
        run.total_seconds = kept["total_seconds"]
        for item in kept["results"]:
            _receive(entry, run, _decode(item), item["seconds"], on_outcome)
        return run

    kept_results: list[dict[str, Any]] = []
    started = time.perf_counter()
    try:
        visible = OmegaConf.create(sections)
        OmegaConf.set_readonly(visible, True)
        OmegaConf.set_struct(visible, True)
        for result in entry.function(visible, context):
            seconds = time.perf_counter() - started
            kept_results.append({**_encode(result), "seconds": seconds})
            _receive(entry, run, result, seconds, on_outcome)
        for claim in entry.claims:
            if claim not in run.outcomes:
                raise RuntimeError(f"the experiment ended without a number for '{claim}'")
    except Exception as error:
        theirs = isinstance(error, UserError)
        run.problem = f"experiment '{entry.name}': {error}" if theirs else traceback.format_exc()
        reason = str(error) if theirs else f"{type(error).__name__}: {error}"
        for claim in entry.claims:
            if claim not in run.outcomes:
                _settle(run, claim, Failure(reason), time.perf_counter() - started, on_outcome)
    run.total_seconds = time.perf_counter() - started
    if not run.problem:
        context.cache.put(key, {"results": kept_results, "total_seconds": run.total_seconds})
    return run


def _dependencies(entry: Experiment, sections: Mapping[str, Any], context: RunContext) -> dict[str, Any]:
    return {
        "config": dict(sections),
        "scale": context.scale,
        "seeds": list(context.seeds),
        "seed": context.seed,
        "published": dict(context.published),
        "threads": context.threads,
        "gpu": gpu_names() if entry.gpu else None,
    }


def _receive(
    entry: Experiment,
    run: ExperimentRun,
    result: Result,
    seconds: float,
    on_outcome: Callable[[ExperimentRun, str], None],
) -> None:
    if isinstance(result, Measurement | NotTested):
        if result.claim not in entry.claims:
            raise RuntimeError(f"experiment '{entry.name}' gave a number for '{result.claim}', which it does not name")
        _settle(run, result.claim, result, seconds, on_outcome)
    else:
        run.exhibits.append(result)


def _settle(
    run: ExperimentRun, claim: str, outcome: Outcome, seconds: float, on_outcome: Callable[[ExperimentRun, str], None]
) -> None:
    run.outcomes[claim] = outcome
    run.seconds[claim] = seconds
    on_outcome(run, claim)


def _encode(result: Result) -> dict[str, Any]:
    """A JSON-like form of a result."""
    if isinstance(result, Picture):
        data = {**asdict(replace(result, png=b"")), "png": base64.b64encode(result.png).decode()}
    elif isinstance(result, Artifact):
        data = {"name": result.name, "path": str(result.path)}
    else:
        data = asdict(result)
    return {"type": type(result).__name__, "data": data}


def _decode(item: Mapping[str, Any]) -> Result:
    data = dict(item["data"])
    match item["type"]:
        case "Measurement":
            return Measurement(**{**data, "values": tuple(data["values"])})
        case "NotTested":
            return NotTested(**data)
        case "Table":
            plot = data["plot"]
            if plot is not None:
                error = plot["error"]
                plot = Plot(**{**plot, "error": tuple(error) if isinstance(error, list) else error})
            return Table(**{**data, "plot": plot})
        case "Picture":
            return Picture(**{**data, "png": base64.b64decode(data["png"])})
        case "Artifact":
            return Artifact(data["name"], Path(data["path"]))
    raise ValueError(f"unknown kind of result: {item['type']}")
