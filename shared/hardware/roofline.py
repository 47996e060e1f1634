"""Latency and energy of a workload on a device: a roofline per operation and an additive energy model.

Latency of an operation, per call: t = max(flops/(P e_f) + vector/(V e_f), read/(R e_b) + written/(W e_b)) + t0, with the peak P of its
data type, the vector rate V and the bandwidths R, W (one bus: R = W) of the memory level, the achieved fractions e_f and e_b, and the
overhead t0 per call. On a device with operator laws the fractions and t0 are those of each row, and V has one of its own
(:mod:`shared.hardware.efficiency`). Matrix and vector work of one operation is not assumed to overlap; operations run one after another.

Energy of an operation: core (per operation) + memory (per byte) + static (floor x time). At board scope the figures are a fit of
P = P0 + e_f op/s + e_b byte/s, clipped at the power limit. The clip lowers the dynamic terms and leaves the time alone: a throttled
board runs at lower voltage, and the achieved fractions were measured on throttled boards already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.hardware import checks
from shared.hardware.arrays import Array, WorkloadArrays
from shared.hardware.batch import Achieved, DeviceBatch, EnergyBatch, EnergyChoice
from shared.hardware.device import DTYPES, Device
from shared.hardware.efficiency import num_tiles


@dataclass(frozen=True, eq=False)
class EnergyCost:
    """Energy terms over all calls, J, arrays (n, n_ops); ``clipped``: the power limit lowered core and memory."""

    op_core_j: Array
    op_memory_j: Array
    op_static_j: Array
    clipped: npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class BatchCost:
    """Cost of one workload on n devices or samples. Arrays ``op_*`` are (n, n_ops) over all calls of a row; totals are (n,)."""

    name: tuple[str, ...]
    device: tuple[str, ...]
    op_compute_s: Array
    op_memory_s: Array
    op_overhead_s: Array
    op_latency_s: Array
    energy: EnergyCost | None
    energy_missing: str
    model_error_rel: tuple[float | None, ...]

    @property
    def latency_s(self) -> Array:
        """Total latency, s."""
        return self.op_latency_s.sum(-1)

    @property
    def bound(self) -> npt.NDArray[np.str_]:
        """What binds each row: ``compute``, ``memory`` or ``overhead``, the largest of the three times."""
        times = np.stack([self.op_compute_s, self.op_memory_s, self.op_overhead_s])
        return np.array(["compute", "memory", "overhead"])[times.argmax(0)]

    @property
    def core_j(self) -> Array:
        """Energy of the operations, J."""
        return self._energy().op_core_j.sum(-1)

    @property
    def memory_j(self) -> Array:
        """Energy of the bytes moved, J."""
        return self._energy().op_memory_j.sum(-1)

    @property
    def static_j(self) -> Array:
        """Floor power x time, J."""
        return self._energy().op_static_j.sum(-1)

    @property
    def energy_j(self) -> Array:
        """Total energy, J. Raises UserError where the devices have no energy model for this workload."""
        return self.core_j + self.memory_j + self.static_j

    @property
    def power_w(self) -> Array:
        """Mean power, W."""
        return self.energy_j / self.latency_s

    def _energy(self) -> EnergyCost:
        if self.energy is None:
            raise UserError(f"no energy for this workload: {self.energy_missing}")
        return self.energy


@dataclass(frozen=True, eq=False)
class Cost:
    """Cost of one workload on one device: the first entry of a :class:`BatchCost`, with plain numbers as totals."""

    batch: BatchCost

    @property
    def name(self) -> tuple[str, ...]:
        """Names of the rows."""
        return self.batch.name

    @property
    def latency_s(self) -> float:
        """Total latency, s."""
        return float(self.batch.latency_s[0])

    @property
    def op_latency_s(self) -> Array:
        """Latency of each row over its calls, s, (n_ops,)."""
        return self.batch.op_latency_s[0]

    @property
    def bound(self) -> tuple[str, ...]:
        """What binds each row: ``compute``, ``memory`` or ``overhead``."""
        return tuple(str(bound) for bound in self.batch.bound[0])

    @property
    def core_j(self) -> float:
        """Energy of the operations, J."""
        return float(self.batch.core_j[0])

    @property
    def memory_j(self) -> float:
        """Energy of the bytes moved, J."""
        return float(self.batch.memory_j[0])

    @property
    def static_j(self) -> float:
        """Floor power x time, J."""
        return float(self.batch.static_j[0])

    @property
    def energy_j(self) -> float:
        """Total energy, J. Raises UserError where the device has no energy model for this workload."""
        return float(self.batch.energy_j[0])

    @property
    def power_w(self) -> float:
        """Mean power, W."""
        return float(self.batch.power_w[0])

    @property
    def has_energy(self) -> bool:
        """Whether the energy properties can be read."""
        return self.batch.energy is not None

    @property
    def model_error_rel(self) -> float | None:
        """Published relative error of the latency model on this device; None where none was published."""
        return self.batch.model_error_rel[0]

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per operation, for a report's table."""
        energy = self.batch.energy
        rows: list[dict[str, Any]] = []
        for i, (name, bound) in enumerate(zip(self.name, self.bound, strict=True)):
            row: dict[str, Any] = {"name": name, "latency_s": float(self.op_latency_s[i]), "bound": bound}
            if energy is not None:
                row |= {
                    "core_j": float(energy.op_core_j[0, i]),
                    "memory_j": float(energy.op_memory_j[0, i]),
                    "static_j": float(energy.op_static_j[0, i]),
                }
            rows.append(row)
        return rows


def cost(
    arrays: WorkloadArrays,
    device: Device,
    *,
    achieved: Achieved | None = None,
    ideal: bool = False,
    level: str = "dram",
    energy: EnergyChoice = "auto",
    compulsory_bytes: float | None = None,
    memory_in_use_bytes: float | None = None,
) -> Cost:
    """Cost of a workload on a device.

    Args:
        achieved: fractions of the peaks and overhead per call; what is not given comes from the device's calibration.
        ideal: the datasheet roofline instead: fractions 1, no overhead.
        level: the memory level that ``bytes_read`` and ``bytes_written`` cross.
        energy: ``auto`` (board scope where the device has all figures for this workload, else component scope, else no energy),
            ``board`` or ``component`` (an error where a figure is missing), ``none``, or ``ConstantPower(watts)``. Scopes never mix.
        compulsory_bytes: weights, inputs and outputs once; the workload's traffic must not be less.
        memory_in_use_bytes: checked against the capacity of ``level``; leave it out where offloading is modelled.

    Raises:
        UserError: a rate, calibration or energy figure that the device does not have.
        PhysicsError: a bound of :mod:`shared.hardware.checks` does not hold.
    """
    if compulsory_bytes is not None:
        checks.require_traffic(arrays.total("bytes_moved"), compulsory_bytes)
    if memory_in_use_bytes is not None:
        checks.require_fits(memory_in_use_bytes, device.size_bytes(level), f"{level} of device '{device.id}'")
    batch = DeviceBatch.of([device], arrays, achieved=achieved, ideal=ideal, level=level, energy=energy)
    return Cost(cost_batch(arrays, batch))


def cost_batch(arrays: WorkloadArrays, batch: DeviceBatch) -> BatchCost:
    """Cost of a workload on all entries of a batch at once; the same model and checks as :func:`cost`."""
    checks.require_utilisation(batch.compute_fraction)
    checks.require_utilisation(batch.vector_fraction)
    checks.require_utilisation(batch.bandwidth_fraction)
    if not batch.swept:
        checks.require_overhead(batch.overhead_s)
    count = arrays.count.astype(np.float64)
    flop_s = _per_row(batch.op_per_s, arrays, batch.size, fill=np.inf)
    compute_s = arrays.flops * count / flop_s
    vector_s = arrays.vector_ops * count / batch.vector_op_per_s[:, None]
    if np.array_equal(batch.vector_fraction, batch.compute_fraction):
        compute_s = (compute_s + vector_s) / batch.compute_fraction
    else:
        compute_s = compute_s / batch.compute_fraction + vector_s / batch.vector_fraction
    memory_s = arrays.bytes_read * count / batch.read_bytes_per_s[:, None]
    memory_s += arrays.bytes_written * count / batch.write_bytes_per_s[:, None]
    memory_s /= batch.bandwidth_fraction
    overhead_s = np.broadcast_to(batch.overhead_s * count, compute_s.shape)
    latency_s = np.maximum(compute_s, memory_s) + overhead_s
    if batch.serial.any():
        latency_s += batch.serial * np.minimum(compute_s, memory_s)
    result = BatchCost(
        name=arrays.name,
        device=batch.device,
        op_compute_s=compute_s,
        op_memory_s=memory_s,
        op_overhead_s=overhead_s,
        op_latency_s=latency_s,
        energy=_energy(arrays, batch, batch.energy, latency_s) if batch.energy else None,
        energy_missing=batch.energy_missing,
        model_error_rel=batch.model_error_rel,
    )
    check_cost(result, arrays, batch)
    return result


def check_cost(result: BatchCost, arrays: WorkloadArrays, batch: DeviceBatch) -> None:
    """All bounds of :mod:`shared.hardware.checks` that need nothing but the cost. Raises PhysicsError naming the bound.

    A swept batch is held to the roofline alone.
    """
    flops = _totals_by_dtype(arrays)
    matrix_s = sum((total / batch.op_per_s[dtype] for dtype, total in flops.items()), np.zeros(batch.size))
    vector_s = arrays.total("vector_ops") / batch.vector_op_per_s
    memory_s = (
        arrays.total("bytes_read") / batch.read_bytes_per_s + arrays.total("bytes_written") / batch.write_bytes_per_s
    )
    roofline_s = np.maximum(np.maximum(matrix_s, vector_s), memory_s)
    busy_s = (result.op_latency_s - result.op_overhead_s).sum(-1)
    tiles = float(num_tiles(arrays.shapes()) @ arrays.count) if batch.tiled else 0.0
    if batch.tiled and batch.swept:  # a fit tries shares far from any that it will find
        tiles = np.inf
    checks.require_time(busy_s, roofline_s, checks.MAX_TILE_S * tiles)
    if batch.swept or result.energy is None or batch.energy is None:
        return
    energy = batch.energy
    latency_s, core_j, energy_j = result.latency_s, result.core_j, result.energy_j
    checks.require_power(energy_j, latency_s, energy.limit_w)
    minimum_j = sum(total * checks.MIN_J_PER_OP.get(DTYPES.get(dtype, dtype), 0.0) for dtype, total in flops.items())
    checks.require_min_energy(np.where(energy.splits > 0, core_j, energy_j), minimum_j)
    macs = (sum(flops.values()) + arrays.total("vector_ops")) / 2
    checks.require_energy_per_mac(core_j, macs * energy.splits)
    # Where bytes outnumber MACs, the byte is the unit of work that the energy is spread over.
    busy_j = energy_j - energy.floor_w * result.op_overhead_s.sum(-1)
    checks.require_energy_per_mac(busy_j, max(macs, arrays.total("bytes_moved")))


def _energy(arrays: WorkloadArrays, batch: DeviceBatch, model: EnergyBatch, latency_s: Array) -> EnergyCost:
    count = arrays.count.astype(np.float64)
    core_j = arrays.flops * count * _per_row(model.core_j_per_op, arrays, batch.size, fill=0.0)
    core_j += arrays.vector_ops * count * model.vector_j_per_op[:, None]
    memory_j = arrays.bytes_read * count * model.read_j_per_byte[:, None]
    memory_j += arrays.bytes_written * count * model.write_j_per_byte[:, None]
    if model.cache_j_per_byte is not None:
        held_j = (arrays.bytes_read + arrays.bytes_written) * count * model.cache_j_per_byte[:, None]
        memory_j = (1.0 - batch.cached) * memory_j + batch.cached * held_j
    static_j = model.floor_w[:, None] * latency_s
    dynamic_j = core_j + memory_j
    limit_w = model.limit_w[:, None]
    if not batch.swept:
        excess = np.where(model.clips > 0, checks.MAX_POWER_EXCESS, 1.0)[:, None]
        checks.require_power(dynamic_j + static_j, latency_s, limit_w, excess=excess)
    allowed_j = np.maximum(limit_w - model.floor_w[:, None], 0.0) * latency_s
    clipped = (dynamic_j > allowed_j) & (model.clips > 0)[:, None]
    if clipped.any():
        scale = np.divide(allowed_j, dynamic_j, out=np.ones_like(dynamic_j), where=clipped)
        core_j *= scale
        memory_j *= scale
    return EnergyCost(core_j, memory_j, static_j, clipped)


def _per_row(values: Mapping[str, Array], arrays: WorkloadArrays, n: int, *, fill: float) -> Array:
    """Values of each row's data type, (n, n_ops); ``fill`` where the row has no matrix operations."""
    rows = np.full((n, arrays.n_ops), fill)
    for dtype, value in values.items():
        rows[:, _of_dtype(arrays, dtype)] = value[:, None]
    return rows


def _of_dtype(arrays: WorkloadArrays, dtype: str) -> npt.NDArray[np.bool_]:
    return np.array([row == dtype for row in arrays.dtype]) & (arrays.flops > 0)


def _totals_by_dtype(arrays: WorkloadArrays) -> dict[str, float]:
    dtypes: Sequence[str] = sorted(
        {dtype for dtype, flops in zip(arrays.dtype, arrays.flops, strict=True) if flops > 0}
    )
    return {dtype: float((arrays.flops * arrays.count)[_of_dtype(arrays, dtype)].sum()) for dtype in dtypes}
