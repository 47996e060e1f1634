"""``sensitivity=true``: which figure or assumption, moved by how much, flips a verdict.

A claim names the figures it rests on (``depends_on``: config keys and device figures); a modelled claim also rests on every figure of the
device that moves its number, which is found by moving them. Each is moved alone over its uncertainty, and then as far as it takes to
change the verdict; the experiment is evaluated anew for every sample, so that no model has to be written twice. Over all uncertainties at
once, Sobol indices on a response surface say which figure the spread comes from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import OmegaConf

from shared.claims import Claim
from shared.errors import UserError
from shared.experiment import Experiment, Measurement
from shared.hardware.indices import sobol_indices
from shared.hardware.sensitivity import Uncertain, one_at_a_time
from shared.judge import Situation, judge
from shared.runner.context import RunContext
from shared.runner.settings import Config
from shared.verdict import Verdict

ASSUMED_UNCERTAINTY = 0.1  # of a config value, which states none
SLOW_S = 0.01  # an experiment that takes longer for one sample is moved in coarser steps
COARSE = {"grid_points": 33, "range_points": 5, "bisections": 16}  # steps of 33 %, a flip to 1e-5
PROBE = 0.97  # a device figure is moved by this factor to see whether a number rests on it
UNMOVED = 1e-9  # relative change of the number below which it does not

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
                paths = list(claim.depends_on)
                if claim.evidence == "modelled" and "device" in entry.config:
                    known = [path for path in _device_figures(config["device"]) if path not in paths]
                    paths += _influential(known, config, claim.id, samplers[entry.name])
                figures = {path: _figure(config, path, claim.id) for path in paths}
                rows[claim.id] = _one_claim(claim, outcomes[claim.id], situation, figures, samplers[entry.name])
            task(number + 1)
    return rows


def sentence(claim: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The figure that matters most to a claim's number, and how far what figure must move to flip its verdict."""
    widest = max(rows, key=lambda row: row["total_index"] or 0.0)
    if not widest["total_index"]:
        widest = max(rows, key=lambda row: float(np.nan_to_num(row["value_high"] - row["value_low"])))
    share = f" ({widest['total_index']:.0%} of the variance)" if widest["total_index"] else ""
    text = f"{claim}: {_short(widest['figure'])} matters most{share}"
    flips = [row for row in rows if row["flip_factor"]]
    if not flips:
        return f"{text}; no figure moved alone within 100x flips the verdict"
    nearest = min(flips, key=lambda row: abs(np.log(row["flip_factor"])))
    factor = nearest["flip_factor"]
    return f"{text}; flips if {_short(nearest['figure'])} {'falls under' if factor < 1 else 'rises over'} {factor:.3g}x"


def _short(path: str) -> str:
    return path.removeprefix("device.")


def _device_figures(node: Any, path: str = "device") -> Iterator[str]:
    """Paths of all figures of a device's config that are uncertain."""
    if not isinstance(node, Mapping):
        return
    if "value" in node and "unit" in node:
        if node.get("rel_unc") or node.get("lo") != node.get("hi"):
            yield path
        return
    for name, child in node.items():
        yield from _device_figures(child, f"{path}.{name}")


def _influential(paths: Sequence[str], config: Config, claim: str, sampler: _Sampler) -> list[str]:
    """Those of ``paths`` that move the claim's number. Groups are moved together and halved, so that few evaluations clear most figures.

    Errors of the model are no figures of the device that it computes with: moving them changes the interval, not the number.
    """
    nominal = sampler({}).get(claim, np.nan)
    if not np.isfinite(nominal):
        return []

    def moves(group: Sequence[str]) -> bool:
        value = sampler({path: float(_node(config, path)["value"]) * PROBE for path in group}).get(claim, np.nan)
        return not abs(value - nominal) <= UNMOVED * abs(nominal)

    def search(group: Sequence[str]) -> list[str]:
        if not group or not moves(group):
            return []
        if len(group) == 1:
            return list(group)
        middle = len(group) // 2
        return search(group[:middle]) + search(group[middle:])

    return search(paths)


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

    uncertain = {path: entry for path, (entry, _) in figures.items()}
    sampler({})  # so that the time of an evaluation is known
    effort = {} if sampler.seconds < SLOW_S else COARSE
    found = one_at_a_time(model, uncertain, same_verdict, **effort)
    whole = {
        path for path in uncertain if isinstance(sampler.nominal(path), int)
    }  # a design has 16 experts, not 16 +- 10 %
    indices = sobol_indices(
        model, {path: _still(u) if path in whole else u for path, u in uncertain.items()}, surface=True
    )
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
            "first_index": indices.first.get(row.figure) if indices else None,
            "total_index": indices.total.get(row.figure) if indices else None,
        }
        for row in found
    ]


def _still(figure: Uncertain) -> Uncertain:
    return Uncertain(figure.value, figure.value, figure.value, figure.maximum)


def _moved(nominal: Measurement, value: float) -> Measurement:
    return Measurement(nominal.claim, float(value), model_error_rel=nominal.model_error_rel, n_seeds=nominal.n_seeds)


class _Sampler:
    """An experiment's numbers with some figures moved; each sample is evaluated once for all claims of the experiment."""

    def __init__(self, config: Config, entry: Experiment, context: RunContext) -> None:
        self._config, self._entry, self._context = config, entry, context
        self._visible = OmegaConf.create({name: config[name] for name in entry.config})
        self._known: dict[tuple[tuple[str, float], ...], dict[str, float]] = {}
        self.seconds = 0.0  # that the latest evaluation took

    def nominal(self, path: str) -> Any:
        """What the config has at a path."""
        return _node(self._config, path)

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
            start = time.perf_counter()
            try:
                self._known[key] = self._measurements()
            except (UserError, ArithmeticError, ValueError):
                self._known[key] = {}
            finally:
                self.seconds = time.perf_counter() - start
                for path, old in before.items():
                    OmegaConf.update(self._visible, path, old, merge=False)
        return self._known[key]

    def _measurements(self) -> dict[str, float]:
        """Runs the experiment until it has a number for each of its claims: tables and pictures after the last are not drawn up."""
        found: dict[str, float] = {}
        for result in self._entry.function(self._visible, self._context):
            if isinstance(result, Measurement):
                found[result.claim] = result.value
                if found.keys() >= set(self._entry.claims):
                    break
        return found


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
