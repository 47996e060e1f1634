"""One measured machine from its file to its device file: draft, fit, validation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from shared.calibrate import devicefile
from shared.calibrate.fit import Fit, fit_device, samples_of
from shared.calibrate.fit_power import EnergyPrediction, fit_power, predict_energy
from shared.calibrate.measure import EAGER_SIZES, Measured
from shared.calibrate.models import HeldOut, held_out_models
from shared.calibrate.points import Point, build
from shared.calibrate.validate import Prediction, errors, predict
from shared.errors import UserError
from shared.hardware import WorkloadArrays, load_device
from shared.hardware.efficiency import operator_classes
from shared.workload import trace

LIKE = {
    "depthwise": "conv", "conv1x1": "conv", "conv1x1_odd": "conv", "stem": "conv", "gather": "gather_rows", "scatter": "gather_rows",
    "sort": "gather_rows", "topk": "gather_rows", "broadcast": "pointwise", "integer": "pointwise", "division": "pointwise",
    "pool": "reduction",
}  # fmt: skip


@dataclass(frozen=True)
class Calibrated:
    """What is known of one machine."""

    measured: Measured
    data: Mapping[str, Any]  # of the device file
    fit: Fit
    predictions: list[Prediction]
    energy: list[EnergyPrediction]
    left_out: list[str]  # what could not be measured or predicted, and why


def load_measured(path: Path) -> Measured:
    """A file of measurements.

    Raises:
        UserError: it is none.
    """
    try:
        content = json.loads(path.read_text())
        return Measured(**{field.name: content[field.name] for field in fields(Measured)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no measurements ({error}): measure again with calibrate=cpu or calibrate=cuda"
        ) from None


def calibrated(path: Path, devices: Path, models: Callable[[], list[HeldOut]] = held_out_models) -> Calibrated:
    """Fit and validate one machine, and write its device file into ``devices``."""
    measured = load_measured(path)
    result = evaluate(measured, path.stem, models())
    machine = measured.machine
    heading = (
        f"Measured by python run.py calibrate={machine['device']} on {machine['date']} (commit {machine['commit'] or 'unknown'}).\n"
        "Written by that command and by calibrate=table: change the measurement or the laws, not this file."
    )
    devicefile.write(result.data, devices / f"{path.stem}.yaml", heading)
    return result


def evaluate(measured: Measured, identity: str, models: list[HeldOut]) -> Calibrated:
    """Fit, then predict what was held out; errors go into the device file."""
    samples = samples_of(measured.points)
    draft = {**devicefile.draft(measured, samples, measured.machine.get("base")), "id": identity}
    fit = fit_device(draft, samples)
    data = devicefile.with_fit(draft, fit, measured)
    if measured.host:
        data["calibration"]["eager_overhead"] = _launches(measured)
    if any("op" in row for row in measured.energy):
        source = f"energy counter, {measured.machine['name']}, {measured.machine['date']}"
        data["energy"] = {**data.get("energy", {}), "board": fit_power(measured.energy, load_device(data), source)}
    device = load_device(data)
    predictions, left_out = predict(measured, device, models)
    can = {(p.model, p.dtype) for p in predictions}
    windows = [row for row in measured.energy if "model" in row and (row["model"], row["dtype"]) in can]
    energy = predict_energy(windows, device, models) if device.energy.board else []
    data = devicefile.with_errors(data, _errors(predictions, energy))
    return Calibrated(measured, data, fit, predictions, energy, [*measured.failures, *left_out])


def _errors(predictions: list[Prediction], energy: list[EnergyPrediction]) -> dict[str, tuple[Any, str]]:
    """The device's own time is what a device model predicts: graphs on a GPU, calls on a CPU."""
    found: dict[str, tuple[Any, str]] = {}
    if predictions:
        mode = "graph" if any(p.mode == "graph" for p in predictions) else "eager"
        names = {"calibrated": "held_out_error_rel", "simple": "simple_error_rel", "roofline": "roofline_error_rel"}
        for which, name in names.items():
            values = errors(predictions, which, mode=mode)
            words = (
                f"held-out models, {len(values)} runs: mean absolute error; lo is the median, hi the 90th percentile"
            )
            found[name] = (values, words)
    if energy:
        found["energy_error_rel"] = (
            np.abs([p.error_rel for p in energy]),
            f"{len(energy)} held-out models, energy counter",
        )
    return found


def _launches(measured: Measured) -> dict[str, Any]:
    """Host time of a launch by class of operator: the mean of what was timed of it."""
    grouped: dict[str, list[float]] = {}
    for op, seconds in measured.host.items():
        module, inputs = build(Point(op, EAGER_SIZES[op], "bf16"), "meta")
        (name,) = operator_classes(WorkloadArrays.from_workload(trace(module, *inputs)))
        grouped.setdefault(name, []).append(seconds)
    for name, other in LIKE.items():  # launched by the same code
        grouped.setdefault(name, grouped[other])
    source = f"small calls launched back to back, {measured.machine['cpu']}, torch {measured.machine['torch']}"
    return {name: devicefile.figure(float(np.mean(values)), "s", source, 0.3) for name, values in grouped.items()}
