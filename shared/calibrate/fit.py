"""The fit: shares, bandwidths and overheads of :mod:`shared.hardware.efficiency` from the micro-benchmarks, by robust least squares.

Residuals are log(model / measured), so a fast call counts as much as a slow one; a soft-L1 loss keeps a few disturbed timings from
deciding. The model is the cost model itself (:func:`shared.hardware.cost_batch`) on a batch of devices, one for each moved figure, so
that what is fitted is what is used. First the stream (bandwidth of DRAM and caches), then each class of operators with the stream held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import least_squares

from shared.calibrate.points import Point, build
from shared.hardware import Achieved, Device, DeviceBatch, WorkloadArrays, cost_batch, load_device
from shared.hardware.arrays import Array
from shared.hardware.efficiency import MATRIX, law_path, measured_class, operator_classes
from shared.workload import trace
from shared.workload.table import Op, Workload

LOSS_SCALE = 0.1  # residuals beyond this (10 %) count linearly
FEWEST = 3  # points of a class in a precision: fewer say nothing about its figures
STARTS = (
    (0.5, 1.0),
    (3.0, 1.0),
    (0.5, 0.2),
    (0.5, 2.5),
)  # factors on the starting lengths of half rate and bandwidths of a matrix class
ROW_STARTS = ((0.5, 1.0), (3.0, 1.0), (30.0, 1.0), (100.0, 1.0))  # a row may cost as much as thousands of its elements
LARGEST_UNCERTAINTY = 0.9
FLAT = 1e-3


@dataclass
class Fit:
    """Fitted figures by their path in the device file, with relative standard errors, and the fit's own errors (relative, per point)."""

    values: dict[str, float] = field(default_factory=dict)
    uncertainty: dict[str, float] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)  # by class

    @property
    def all_errors(self) -> npt.NDArray[np.float64]:
        """Absolute relative errors of all points."""
        return np.abs(np.concatenate([np.asarray(errors) for errors in self.errors.values()]))


@dataclass(frozen=True, eq=False)
class Samples:
    """Timed operators: one row each, its class and precision."""

    arrays: WorkloadArrays
    classes: npt.NDArray[np.str_]
    precisions: npt.NDArray[np.str_]
    seconds: Array

    def select(self, chosen: npt.NDArray[np.bool_]) -> Samples:
        """Some of the rows."""
        a, at = self.arrays, np.flatnonzero(chosen)
        part = WorkloadArrays(
            name=tuple(a.name[i] for i in at),
            dtype=tuple(a.dtype[i] for i in at),
            flops=a.flops[at],
            vector_ops=a.vector_ops[at],
            bytes_read=a.bytes_read[at],
            bytes_written=a.bytes_written[at],
            count=a.count[at],
            kind=tuple(a.kind[i] for i in at),
            shape=tuple(a.shape[i] for i in at),
        )
        return Samples(part, self.classes[at], self.precisions[at], self.seconds[at])


def samples_of(points: Sequence[Mapping[str, Any]]) -> Samples:
    """Measured points (rows of :class:`~shared.calibrate.measure.Measured`) with what they cost by the trace."""
    ops: list[Op] = []
    for row in points:
        module, inputs = build(Point(row["op"], tuple(row["sizes"]), row["dtype"]), "meta")
        work = trace(module, *inputs)
        if len(work.ops) != 1:
            raise ValueError(f"micro-benchmark {row['op']} is traced as {len(work.ops)} operators, it must be one")
        ops += work.ops
    arrays = WorkloadArrays.from_workload(Workload(tuple(ops)))
    precisions = np.array([row["dtype"] for row in points])
    seconds = np.array([row["seconds"] for row in points], dtype=np.float64)
    return Samples(arrays, np.array(operator_classes(arrays)), precisions, seconds)


def fit_device(data: Mapping[str, Any], samples: Samples) -> Fit:
    """Fit all classes that were measured.

    Args:
        data: a device file with peaks, memory levels and ``calibration`` with ``caches``, ``operators`` of starting values and, for a GPU,
            ``tile_half`` (see :func:`shared.calibrate.devicefile.draft`).
        samples: what was measured.
    """
    device, found = load_device(data), Fit()
    known = device.calibration.operators
    samples = replace(samples, classes=np.array([measured_class(known, name) for name in samples.classes]))
    laws = [(name, precision) for name, by in device.calibration.operators.items() for precision in by]
    stream = samples.select(samples.classes == "pointwise")
    caches = [f"memory.{cache}.{what}" for cache in device.calibration.caches for what in ("bandwidth", "usable")]
    own = [path for name, precision in laws if name == "pointwise" for path in _paths(device, name, precision)]
    shared_by_all = ["calibration.bandwidth_fraction", *caches]
    _fit(
        device, stream, [*shared_by_all, *(path for path in own if not path.endswith(".bandwidth"))], found, "pointwise"
    )
    if device.calibration.tile_half:
        paths = [path for name, precision in laws if name == "matmul" for path in _paths(device, name, precision)]
        _fit(device, samples.select(samples.classes == "matmul"), ["calibration.tile_half", *paths], found, "matmul")
    for name, precision in laws:
        if name == "pointwise" or (name == "matmul" and device.calibration.tile_half):
            continue
        chosen = samples.select((samples.classes == name) & (samples.precisions == precision))
        _fit(device, chosen, _paths(device, name, precision), found, name)
    _fit_simple(device, samples, found)
    return found


def _paths(device: Device, name: str, precision: str) -> list[str]:
    prefix = law_path(device, name, precision) + "."
    return [path for path in device.figures() if path.startswith(prefix)]


def _fit(device: Device, samples: Samples, paths: Sequence[str], found: Fit, name: str) -> None:
    """Fit the figures at ``paths`` to ``samples`` and add them to ``found``; what is in it already holds."""
    held = dict(found.values)
    start = np.log([device.figure(path).value for path in paths])
    low, high = np.log(np.array([_bounds(device, path) for path in paths])).T
    start = np.clip(start, low + 1e-6, high - 1e-6)

    def residuals(x: Array) -> Array:
        return predicted(device, samples.arrays, paths, x[None], held)[0] - np.log(samples.seconds)

    def jacobian(x: Array) -> Array:
        step = np.where(x + 1e-4 > high, -1e-4, 1e-4)
        moved = predicted(device, samples.arrays, paths, np.concatenate((x[None], x + np.diag(step))), held)
        return ((moved[1:] - moved[0]) / step[:, None]).T

    lengths = np.array([path.endswith("_half") for path in paths])
    bandwidths = np.array([path.startswith("calibration.operators") and path.endswith("bandwidth") for path in paths])
    lengths |= np.array([path.endswith(".usable") for path in paths])
    starts = STARTS if name in MATRIX else ROW_STARTS if lengths.any() else STARTS[:1]
    solutions = []
    for length, bandwidth in starts:
        begin = start + lengths * np.log(length) + bandwidths * np.log(bandwidth)
        begin = np.clip(begin, low + 1e-6, high - 1e-6)
        solutions.append(
            least_squares(residuals, begin, jacobian, bounds=(low, high), loss="soft_l1", f_scale=LOSS_SCALE)
        )
    best = min(solutions, key=lambda solution: solution.cost)
    errors = np.expm1(residuals(best.x))
    spread = np.sqrt(
        np.mean(np.minimum(np.abs(best.fun), LOSS_SCALE) ** 2) * len(errors) / max(len(errors) - len(paths), 1)
    )
    information = best.jac.T @ best.jac + FLAT * np.eye(len(paths))  # what moves nothing keeps its whole uncertainty
    deviation = spread * np.sqrt(np.diag(np.linalg.inv(information)))
    for path, value, error in zip(paths, np.exp(best.x), deviation, strict=True):
        found.values[path] = float(value)
        found.uncertainty[path] = float(np.clip(2 * error, 0.01, LARGEST_UNCERTAINTY))
    found.errors.setdefault(name, []).extend(float(error) for error in errors)


def predicted(
    device: Device, arrays: WorkloadArrays, paths: Sequence[str], x: Array, held: Mapping[str, float]
) -> Array:
    """log seconds (samples, rows) with the figures at ``paths`` at exp(x) (samples, paths) and others ``held``."""
    count = len(x)
    figures = {path: np.full(count, value) for path, value in held.items()}
    figures |= {path: np.exp(x[:, i]) for i, path in enumerate(paths)}
    batch = DeviceBatch.varied(device, arrays, figures, energy="none")
    return np.log(cost_batch(arrays, batch).op_latency_s)


def _bounds(device: Device, path: str) -> tuple[float, float]:
    last = path.rsplit(".", 1)[-1]
    if last == "overhead":
        return 1e-8, 1e-3
    if last.endswith("_half"):
        return 1.0, 8192.0
    if path.startswith("memory."):  # no cache is slower than what lies behind it, or holds less than a page
        return (device.bandwidth_bytes_per_s(), 1e14) if last == "bandwidth" else (4096.0, 1e10)
    if last == "serial":
        return 1e-3, 1.0
    if last == "bandwidth":
        return 1e-3, 3.0  # a class may stream better than elementwise work does
    return 1e-5, 1.0


def _fit_simple(device: Device, samples: Samples, found: Fit) -> None:
    """e_f and t0 of the three-figure model, with the stream's e_b: what a workload without kinds is costed with."""
    share = found.values["calibration.bandwidth_fraction"]
    matrix = samples.select(np.isin(samples.classes, MATRIX))

    def residuals(x: Array) -> Array:
        achieved = Achieved(float(np.exp(x[0])), share, float(np.exp(x[1])))
        batch = DeviceBatch.of([device], matrix.arrays, achieved=achieved, energy="none")
        return np.log(cost_batch(matrix.arrays, batch).op_latency_s[0]) - np.log(matrix.seconds)

    low, high = np.log([1e-4, 1e-7]), np.log([1.0, 9e-4])
    solution = least_squares(residuals, np.log([0.5, 1e-5]), bounds=(low, high), loss="soft_l1", f_scale=LOSS_SCALE)
    for i, path in enumerate(("calibration.compute_fraction", "calibration.overhead")):
        found.values[path] = float(np.exp(solution.x[i]))
        found.uncertainty[path] = 0.5
