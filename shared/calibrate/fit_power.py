"""The board's power from energy windows of micro-benchmarks, and its error on held-out models.

Energy of a call = floor x time + per_op x operations (matrix work by precision, vector work at the vector rate's key) + per_byte x bytes
(of DRAM and of the cache, by the calibrated share of hits), none below what circuits need; least squares of relative residuals. Operands
are normally distributed: zeros draw less power.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from shared.calibrate.devicefile import figure
from shared.calibrate.models import HeldOut
from shared.calibrate.points import Point, build
from shared.calibrate.validate import latency_s, work_of
from shared.hardware import Device, DeviceBatch, WorkloadArrays, cost
from shared.hardware.checks import MIN_J_PER_OP
from shared.workload import Workload, trace

LEAST_J_PER_BYTE = (
    2e-12  # a quarter of a picojoule a bit: the smallest memories of a chip (checks.py has that of operations)
)


@dataclass(frozen=True)
class EnergyPrediction:
    """A held-out model's energy a call, J: measured (mean and range over windows) and modelled with the modelled time."""

    model: str
    batch: int
    dtype: str
    measured_j: float
    low_j: float
    high_j: float
    windows: int
    power_w: float
    modelled_j: float
    measured_s: float
    modelled_s: float

    @property
    def error_rel(self) -> float:
        """(modelled - measured) / measured."""
        return self.modelled_j / self.measured_j - 1.0


def fit_power(rows: Sequence[Mapping[str, Any]], device: Device, source: str) -> dict[str, Any]:
    """``energy.board`` of a device file from the windows of micro-benchmarks."""
    windows = [row for row in rows if "op" in row]
    terms: list[dict[str, float]] = []
    for row in windows:
        module, inputs = build(Point(row["op"], tuple(row["sizes"]), row["dtype"]), "meta")
        terms.append({**_terms(trace(module, *inputs), device), "floor": row["seconds"] / row["calls"]})
    names = sorted({name for term in terms for name in term})
    energy = np.array([row["energy_j"] / row["calls"] for row in windows])
    matrix = np.array([[term.get(name, 0.0) for name in names] for term in terms]) / energy[:, None]
    scale = np.linalg.norm(matrix, axis=0)
    least = np.array([LEAST_J_PER_BYTE if name in device.memory else MIN_J_PER_OP.get(name, 0.0) for name in names])
    solution = lsq_linear(matrix / scale, np.ones(len(windows)), (least * scale, np.inf), method="bvls").x / scale
    found = dict(zip(names, map(float, solution), strict=True))
    errors = np.abs(matrix @ solution - 1.0)
    return {
        "method": "energy = floor x time + per_op x operations + per_byte x bytes, over windows of seconds of single operators",
        "fit_error_rel": figure(max(float(errors.mean()), 1e-4), "ratio", source, 0.5),
        "floor": figure(found["floor"], "W", source, 0.1, scope="board"),
        "per_op": {
            name: figure(value, "J/op", source, 0.2, scope="board")
            for name, value in found.items()
            if name in device.peak
        },
        "per_byte": {
            name: figure(value, "J/B", source, 0.2, scope="board")
            for name, value in found.items()
            if name in device.memory
        },
    }


def _terms(work: Workload, device: Device) -> dict[str, float]:
    """Operations by key of ``peak`` and bytes by memory level of one call."""
    arrays = WorkloadArrays.from_workload(work)
    cached = DeviceBatch.of([device], arrays, energy="none").cached
    held = float((cached * arrays.bytes_moved * arrays.count).sum())
    found = {"dram": arrays.total("bytes_moved") - held}
    if device.calibration.caches:
        found[device.calibration.caches[0]] = held
    for op in work.ops:
        if op.flops:
            key = device.peak_key(op.dtype)
            found[key] = found.get(key, 0.0) + op.flops * op.count
        if op.vector_ops:
            found[device.vector_key()] = found.get(device.vector_key(), 0.0) + op.vector_ops * op.count
    return found


def predict_energy(
    rows: Sequence[Mapping[str, Any]], device: Device, models: Sequence[HeldOut]
) -> list[EnergyPrediction]:
    """Energy of the held-out models."""
    builders = {model.name: model for model in models}
    grouped: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("model") in builders:
            grouped.setdefault((row["model"], row["batch"], row["dtype"]), []).append(row)
    found = []
    for (name, batch, dtype), windows in grouped.items():
        work = work_of(builders[name], batch, dtype)
        measured = np.array([row["energy_j"] / row["calls"] for row in windows])
        seconds = sum(row["seconds"] for row in windows)
        found.append(
            EnergyPrediction(
                name, batch, dtype,
                measured_j=float(measured.mean()), low_j=float(measured.min()), high_j=float(measured.max()), windows=len(windows),
                power_w=sum(row["energy_j"] for row in windows) / seconds,
                modelled_j=cost(WorkloadArrays.from_workload(work), device, energy="board").energy_j,
                measured_s=seconds / sum(row["calls"] for row in windows),
                modelled_s=latency_s(work, device, "graph"),
            )
        )  # fmt: skip
    return found
