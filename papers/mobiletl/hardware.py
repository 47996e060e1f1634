"""Latency and energy of one training step on a small device: every operation of the forward and the backward pass on a roofline.

The paper measures on a Raspberry Pi 4 and a Jetson; its numbers are not known to us, so there is no target here. The achieved fractions
are assumptions (config section ``hardware``) and enter with a band of a factor of two either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from papers.mobiletl.counts import Layer, Role, trained_parameters
from shared.hardware import Achieved, Cost, Device, WorkloadArrays, cost
from shared.hardware.batch import EnergyChoice

_ADAM_READ, _ADAM_WRITTEN, _ADAM_OPS = (
    16,
    12,
    15,
)  # per parameter: weight, gradient and two moments in; weight and moments out


@dataclass(frozen=True)
class Assumptions:
    """Achieved fractions of the device's peaks, and the overhead of an operation."""

    pointwise_fraction: float  # convolutions without groups, linear layers
    depthwise_fraction: float
    bandwidth_fraction: float
    overhead_s: float

    def scaled(self, factor: float) -> Assumptions:
        """All fractions times ``factor``, at most 1."""
        return Assumptions(
            *(min(1.0, factor * f) for f in (self.pointwise_fraction, self.depthwise_fraction, self.bandwidth_fraction)),
            self.overhead_s,
        )  # fmt: skip


def step_rows(layers: tuple[Layer, ...], roles: tuple[Role, ...]) -> list[dict[str, Any]]:
    """One row per operation of a step: name, phase, flops, vector_ops, bytes_read, bytes_written.

    A frozen norm is folded into its convolution and a frozen weight has one byte. MobileTL's internal norm and activation are one
    operation each way. The lowest trained convolution computes no gradient of its input. Adam updates what is trained.
    """
    rows: list[dict[str, Any]] = []
    backward: list[dict[str, Any]] = []
    has_lower = False
    for layer, role in zip(layers, roles, strict=True):
        rows.extend(_forward(layer, role))
        if role != "frozen":
            backward.extend(_backward(layer, role, needs_input=has_lower))
            has_lower = True
    updated = trained_parameters(layers, roles)
    rows += backward[::-1]
    rows.append(
        _row(
            "adam", "update", vector_ops=_ADAM_OPS * updated, read=_ADAM_READ * updated, written=_ADAM_WRITTEN * updated
        )
    )
    return rows


def _row(
    name: str, phase: str, *, flops: float = 0, vector_ops: float = 0, read: float = 0, written: float = 0, depthwise: bool = False
) -> dict[str, Any]:  # fmt: skip
    return {
        "name": name, "phase": phase, "dtype": "float32", "flops": flops, "vector_ops": vector_ops, "bytes_read": read,
        "bytes_written": written, "depthwise": depthwise,
    }  # fmt: skip


def _forward(layer: Layer, role: Role) -> Iterator[dict[str, Any]]:
    n, m = layer.elements_in, layer.elements_out
    if layer.kind in ("conv", "linear"):
        weights = layer.weights * (1 if role == "frozen" else 4)
        yield _row(
            layer.path, "forward", flops=2 * layer.macs, read=4 * n + weights, written=4 * m, depthwise=layer.groups > 1
        )
    elif layer.kind == "norm":
        if role in ("trained", "norm"):  # statistics in one pass, the result in another
            yield _row(layer.path, "forward", vector_ops=7 * n, read=8 * n, written=4 * n)
        elif role == "inner":  # with the activation and the packing of its bits
            yield _row(layer.path, "forward", vector_ops=8 * n, read=4 * n, written=4 * n + n / 8)
        elif role == "shift":
            yield _row(layer.path, "forward", vector_ops=2 * n, read=4 * n, written=4 * n)
    elif layer.kind == "act" and role != "inner":
        yield _row(layer.path, "forward", vector_ops=5 * n, read=4 * n, written=4 * n)
    elif layer.kind == "se":
        yield _row(
            layer.path, "forward", flops=2 * layer.macs, vector_ops=2 * n, read=8 * n + 4 * layer.weights, written=4 * n
        )
    elif layer.kind == "add":
        yield _row(layer.path, "forward", vector_ops=n, read=8 * n, written=4 * n)
    elif layer.kind == "pool":
        yield _row(layer.path, "forward", vector_ops=n, read=4 * n, written=4 * m)


def _backward(layer: Layer, role: Role, *, needs_input: bool) -> Iterator[dict[str, Any]]:
    n, m = layer.elements_in, layer.elements_out
    if layer.kind in ("conv", "linear"):
        weights, depthwise = 4 * layer.weights, layer.groups > 1
        if role in ("trained", "inner"):
            yield _row(
                f"{layer.path}.dW",
                "backward",
                flops=2 * layer.macs,
                read=4 * (n + m),
                written=weights,
                depthwise=depthwise,
            )
        if needs_input:
            yield _row(
                f"{layer.path}.dX",
                "backward",
                flops=2 * layer.macs,
                read=4 * m + weights,
                written=4 * n,
                depthwise=depthwise,
            )
    elif layer.kind == "norm":
        if role in ("trained", "norm"):  # sums in one pass, the result in another
            yield _row(layer.path, "backward", vector_ops=13 * n, read=16 * n, written=4 * n)
        elif role == "inner":
            yield _row(layer.path, "backward", vector_ops=3 * n, read=4 * n + n / 8, written=4 * n)
        else:
            yield _row(layer.path, "backward", vector_ops=2 * n, read=4 * n, written=4 * n)
    elif layer.kind == "act" and role != "inner":
        yield _row(layer.path, "backward", vector_ops=6 * n, read=8 * n, written=4 * n)
    elif layer.kind == "se":
        yield _row(
            layer.path,
            "backward",
            flops=4 * layer.macs,
            vector_ops=4 * n,
            read=12 * n + 8 * layer.weights,
            written=4 * n,
        )
    elif layer.kind in ("add", "pool"):
        yield _row(layer.path, "backward", vector_ops=n, read=4 * m, written=4 * n)


def step_cost(
    rows: list[dict[str, Any]], device: Device, assumptions: Assumptions, *, energy: EnergyChoice = "none"
) -> Cost:  # fmt: skip
    """Latency, and energy where asked for, of the rows of :func:`step_rows` on a device."""
    arrays = WorkloadArrays.from_rows(rows)
    depthwise = np.array([row["depthwise"] for row in rows])
    compute = np.where(depthwise, assumptions.depthwise_fraction, assumptions.pointwise_fraction)
    achieved = Achieved(compute, assumptions.bandwidth_fraction, assumptions.overhead_s)
    return cost(arrays, device, achieved=achieved, energy=energy)


def latency_by_phase(rows: list[dict[str, Any]], result: Cost) -> Mapping[str, float]:
    """Seconds of the forward pass, the backward pass and the update."""
    phases: dict[str, float] = {}
    for row, seconds in zip(rows, result.op_latency_s, strict=True):
        phases[row["phase"]] = phases.get(row["phase"], 0.0) + float(seconds)
    return phases
