"""``sensitivity=true``: which figure or assumption, moved by how much, flips a verdict.

A claim names the figures it rests on (``depends_on``: config keys and device figures). Each is moved alone over its uncertainty, and
then as far as it takes to change the verdict; the experiment is evaluated anew for every sample, so that no model has to be written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import OmegaConf

from shared.claims import Claim
from shared.errors import UserError
from shared.experiment import Experiment, Measurement
from shared.hardware.sensitivity import Uncertain, one_at_a_time
from shared.judge import Situation, judge
from shared.runner.context import RunContext
from shared.runner.settings import Config
from shared.verdict import Verdict

ASSUMED_UNCERTAINTY = 0.1  # of a config value, which states none

Values = Mapping[str, npt.NDArray[np.float64]]


def run_sensitivity(
    config: Config,
    experiment_of: Callable[[str], Experiment],
    claims: list[Claim],
    context: RunContext,
    situation: Situation,
    outcomes: Mapping[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """Rows per claim: ``figure, nominal, unit, low, high, value_low, value_high, flip_factor``.

    Raises:
        UserError: a claim depends on a figure that the config does not have.
    """
    chosen = [claim for claim in claims if claim.depends_on and isinstance(outcomes.get(claim.id), Measurement)]
    rows: dict[str, list[dict[str, Any]]] = {}
    samplers: dict[str, _Sampler] = {}
    with context.display.task("sensitivity", total=len(chosen)) as task:
        for number, claim in enumerate(chosen):
            verdict = judge(claim, outcomes[claim.id], situation).verdict
            if verdict not in (Verdict.NOT_TESTED, Verdict.ERROR):
                entry = experiment_of(claim.id)
                if entry.name not in samplers:
                    samplers[entry.name] = _Sampler(config, entry, context)
                for path in claim.depends_on:
                    if path.split(".")[0] not in entry.config:
                        raise UserError(f"claim '{claim.id}' depends on '{path}', which its experiment does not read")
                figures = {path: _figure(config, path, claim.id) for path in claim.depends_on}
                rows[claim.id] = _one_claim(claim, outcomes[claim.id], situation, figures, samplers[entry.name])
            task(number + 1)
    return rows


def _one_claim(
    claim: Claim,
    nominal: Measurement,
    situation: Situation,
    figures: dict[str, tuple[Uncertain, str]],
    sampler: _Sampler,
) -> list[dict[str, Any]]:
    def model(samples: Values) -> npt.NDArray[np.float64]:
        values = []
        for index in range(len(next(iter(samples.values())))):
            moved = {
                path: float(column[index])
                for path, column in samples.items()
                if not np.isclose(column[index], figures[path][0].value, rtol=1e-12)
            }
            values.append(sampler(moved).get(claim.id, np.nan))
        return np.array(values)

    def same_verdict(values: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        base = judge(claim, nominal, situation).verdict
        return np.array(
            [judge(claim, _moved(nominal, value), situation).verdict == base for value in values.ravel()]
        ).reshape(values.shape)

    found = one_at_a_time(model, {path: uncertain for path, (uncertain, _) in figures.items()}, same_verdict)
    return [
        {
            "figure": row.figure,
            "nominal": row.value,
            "unit": figures[row.figure][1],
            "low": figures[row.figure][0].lo,
            "high": figures[row.figure][0].hi,
            "value_low": row.low,
            "value_high": row.high,
            "flip_factor": row.flip_factor,
        }
        for row in found
    ]


def _moved(nominal: Measurement, value: float) -> Measurement:
    return Measurement(nominal.claim, float(value), model_error_rel=nominal.model_error_rel, n_seeds=nominal.n_seeds)


class _Sampler:
    """An experiment's numbers with some figures moved; each sample is evaluated once for all claims of the experiment."""

    def __init__(self, config: Config, entry: Experiment, context: RunContext) -> None:
        self._config, self._entry, self._context = config, entry, context
        self._visible = OmegaConf.create({name: config[name] for name in entry.config})
        self._known: dict[tuple[tuple[str, float], ...], dict[str, float]] = {}

    def __call__(self, moved: Mapping[str, float]) -> dict[str, float]:
        """Claim id -> value; empty where a figure was moved out of what the model can take."""
        key = tuple(sorted(moved.items()))
        if key not in self._known:
            before = {path: _node(self._config, path) for path in moved}
            for path, value in moved.items():
                old = before[path]
                OmegaConf.update(
                    self._visible,
                    path,
                    _scaled(old, value) if isinstance(old, Mapping) else _like(old, value),
                    merge=False,
                )
            try:
                results = self._entry.function(self._visible, self._context)
                self._known[key] = {r.claim: r.value for r in results if isinstance(r, Measurement)}
            except (UserError, ArithmeticError, ValueError):
                self._known[key] = {}
            finally:
                for path, old in before.items():
                    OmegaConf.update(self._visible, path, old, merge=False)
        return self._known[key]


def _like(old: float, value: float) -> float:
    """A whole number stays one, and positive."""
    return max(1, round(value)) if isinstance(old, int) else value


def _scaled(figure: Mapping[str, Any], value: float) -> dict[str, Any]:
    """A device figure at another value, its bounds moved along."""
    factor = value / figure["value"]
    return {
        **figure,
        "value": value,
        **{end: figure[end] * factor for end in ("lo", "hi") if figure.get(end) is not None},
    }


def _figure(config: Config, path: str, claim: str) -> tuple[Uncertain, str]:
    node = _node(config, path)
    if isinstance(node, Mapping) and "value" in node:
        value = float(node["value"])
        if node.get("rel_unc") is not None:
            return Uncertain(value, value * (1 - node["rel_unc"]), value * (1 + node["rel_unc"])), str(node["unit"])
        return Uncertain(value, float(node["lo"]), float(node["hi"])), str(node["unit"])
    if isinstance(node, bool) or not isinstance(node, int | float) or node <= 0:
        raise UserError(f"claim '{claim}' depends on '{path}', which is no positive number of the config: {node}")
    return Uncertain(float(node), node * (1 - ASSUMED_UNCERTAINTY), node * (1 + ASSUMED_UNCERTAINTY)), ""


def _node(config: Config, path: str) -> Any:
    node: Any = config
    for part in path.split("."):
        if not isinstance(node, Mapping) or part not in node:
            raise UserError(f"a claim depends on '{path}', but the config has no '{part}' there")
        node = node[part]
    return node
