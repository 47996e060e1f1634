"""The error on models that the fit has not seen: predicted from their trace, against what was measured in the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.calibrate.measure import Measured
from shared.calibrate.models import BUILT_IN, HeldOut
from shared.calibrate.points import DTYPES
from shared.errors import UserError
from shared.hardware import Achieved, Device, WorkloadArrays, cost
from shared.hardware.efficiency import operator_classes
from shared.hardware.launch import launched_latency_s
from shared.workload import Workload, trace


@dataclass(frozen=True)
class Prediction:
    """One held-out model at one batch and precision. ``mode``: ``graph`` (device alone) or ``eager`` (the host launches each call)."""

    model: str
    batch: int
    dtype: str
    mode: str
    measured_s: float
    calibrated_s: float
    simple_s: float
    roofline_s: float

    def error_rel(self, which: str) -> float:
        """(predicted - measured) / measured of ``calibrated``, ``simple`` (three figures) or ``roofline`` (data sheet)."""
        return float(getattr(self, f"{which}_s") / self.measured_s - 1.0)


def work_of(model: HeldOut, batch: int, dtype: str) -> Workload:
    """What a held-out model executes."""
    module, inputs = model.build(batch, DTYPES[dtype], "meta")
    return trace(module, *inputs)


def predict(measured: Measured, device: Device, models: Sequence[HeldOut]) -> tuple[list[Prediction], list[str]]:
    """Predictions for all held-out rows, and which rows have none and why: a builder that is gone, an operator that was not calibrated."""
    builders = {model.name: model for model in models}
    works: dict[tuple[str, int, str], Workload] = {}
    found, left_out = [], {}
    for row in measured.held_out:
        if row["model"] not in builders:
            left_out[row["model"]] = f"{row['model']}: no builder of that name any more"
            continue
        key = (row["model"], row["batch"], row["dtype"])
        if key not in works:
            works[key] = work_of(builders[row["model"]], row["batch"], row["dtype"])
        try:
            seconds = [
                latency_s(works[key], device, row["mode"], name) for name in ("calibrated", "simple", "roofline")
            ]
        except UserError as error:
            left_out[f"{row['model']} {row['dtype']}"] = f"{row['model']} in {row['dtype']}: {error}"
            continue
        found.append(Prediction(*key, row["mode"], row["seconds"], *seconds))
    return found, list(left_out.values())


def latency_s(work: Workload, device: Device, mode: str, model: str = "calibrated") -> float:
    """Latency of a traced workload by one of the three models. In eager mode on a GPU the host's launches may be what takes long."""
    arrays = WorkloadArrays.from_workload(work)
    known = device.calibration
    if model == "roofline":
        return cost(arrays, device, ideal=True, energy="none").latency_s
    if model == "simple":
        return cost(arrays, device, achieved=Achieved(), energy="none").latency_s
    found = cost(arrays, device, energy="none")
    if mode != "eager" or not known.eager_overhead:
        return found.latency_s
    classes = operator_classes(arrays)
    missing = sorted({name for name in classes if name not in known.eager_overhead})
    if missing:
        raise UserError(f"device '{device.id}' has no calibration.eager_overhead for {', '.join(missing)}")
    launches = np.array([known.eager_overhead[name].value for name in classes])
    return float(launched_latency_s(found.op_latency_s, launches * arrays.count))


def errors(predictions: Sequence[Prediction], which: str, **where: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Absolute relative errors of one model over the rows that agree with ``where``: values of fields, or several of them."""
    rows = [p for p in predictions if all(_agrees(getattr(p, key), value) for key, value in where.items())]
    return np.abs(np.array([p.error_rel(which) for p in rows]))


def _agrees(found: Any, wanted: Any) -> bool:
    return found in wanted if isinstance(wanted, frozenset) else bool(found == wanted)


def summary(predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    """Median and 90th percentile of the absolute percentage error, by mode and precision, over all, and over the papers' own models."""
    groups: dict[str, Mapping[str, Any]] = {}
    for p in predictions:
        groups.setdefault(f"{p.mode}, {p.dtype}", {"mode": p.mode, "dtype": p.dtype})
    for p in predictions:
        groups.setdefault(f"{p.mode}, all", {"mode": p.mode})
    own = frozenset(p.model for p in predictions) - {model.name for model in BUILT_IN}
    for p in predictions:
        if p.model in own:
            groups.setdefault(f"{p.mode}, the papers' models", {"mode": p.mode, "model": own})
    rows = []
    for name, where in groups.items():
        row: dict[str, Any] = {"group": name}
        for which in ("calibrated", "simple", "roofline"):
            found = errors(predictions, which, **where)
            row |= {
                "n": len(found),
                f"{which}_median": float(np.median(found)),
                f"{which}_p90": float(np.percentile(found, 90)),
            }
        rows.append(row)
    return rows
