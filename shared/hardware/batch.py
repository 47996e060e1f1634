"""The figures that one workload needs of a device, as arrays over devices or over samples of uncertain figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from shared.errors import UserError
from shared.hardware.arrays import Array, WorkloadArrays
from shared.hardware.device import Device
from shared.hardware.efficiency import Shares, has_laws, shares


@dataclass(frozen=True, eq=False)
class Achieved:
    """What the silicon reaches of its peaks. ``None`` is taken from the device's calibration, and is an error where that lacks it.

    Args:
        compute, bandwidth: fractions in (0, 1] of the peak rate and bandwidth, scalar or one per row of the workload.
        overhead_s: seconds per call, scalar or one per row.
        error_rel: published relative error of the model with these numbers; the calibration's own where all three are taken from it.
    """

    compute: float | Array | None = None
    bandwidth: float | Array | None = None
    overhead_s: float | Array | None = None
    error_rel: float | None = None


IDEAL = Achieved(1.0, 1.0, 0.0)


@dataclass(frozen=True)
class ConstantPower:
    """E = P t: the device draws ``power_w`` whatever it does. All energy is then static."""

    power_w: float


EnergyChoice = Literal["auto", "board", "component", "none"] | ConstantPower


@dataclass(frozen=True, eq=False)
class EnergyBatch:
    """Figures of the energy model, arrays (n,): floor x time + core x operations + memory x bytes, clipped where ``clips``."""

    floor_w: Array
    core_j_per_op: Mapping[str, Array]
    vector_j_per_op: Array
    read_j_per_byte: Array
    write_j_per_byte: Array
    cache_j_per_byte: Array | None  # of bytes that a cache holds; None: they cost what the others do
    limit_w: Array
    clips: Array  # 1 where power is clipped at the limit (board scope), 0 where exceeding it is an error
    splits: Array  # 1 where core and memory have terms of their own, 0 for a constant power


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """Rates (n,) for one workload. Fractions of rates and bandwidth, ``overhead_s`` and ``serial`` are (n, 1) or (n, n_ops)."""

    device: tuple[str, ...]
    figures: tuple[str, ...]  # paths of the device figures that went in
    op_per_s: Mapping[str, Array]
    vector_op_per_s: Array
    read_bytes_per_s: Array
    write_bytes_per_s: Array
    compute_fraction: Array
    vector_fraction: Array
    bandwidth_fraction: Array
    overhead_s: Array
    serial: Array  # part of the shorter of computing and moving that is not hidden
    cached: Array  # share of the bytes that caches hold
    energy: EnergyBatch | None
    energy_missing: str  # why there is no energy
    model_error_rel: tuple[float | None, ...]
    swept: bool = False  # figures were moved on purpose: bounds on what is plausible do not apply
    tiled: bool = False  # products run in whole tiles, however small they are

    @classmethod
    def of(
        cls,
        devices: Sequence[Device],
        arrays: WorkloadArrays,
        *,
        achieved: Achieved | None = None,
        ideal: bool = False,
        level: str = "dram",
        energy: EnergyChoice = "auto",
    ) -> DeviceBatch:
        """One entry per device. Arguments as for :func:`shared.hardware.roofline.cost`."""
        parts = [_resolve(device, arrays, {}, achieved, ideal, level, energy) for device in devices]
        return parts[0] if len(parts) == 1 else _concatenate(parts)

    @classmethod
    def varied(
        cls,
        device: Device,
        arrays: WorkloadArrays,
        figures: Mapping[str, Array],
        *,
        achieved: Achieved | None = None,
        ideal: bool = False,
        level: str = "dram",
        energy: EnergyChoice = "auto",
    ) -> DeviceBatch:
        """One device with some figures replaced by samples: path in the file -> values (n,).

        A figure that the cost does not depend on changes nothing (the attribute ``figures`` lists those that it does depend on); a path
        that the device does not have is a UserError. A figure moved by 100x is no unit slip, so the costs of such a batch are checked
        against the roofline but not for plausible overhead, power and energy per operation.
        """
        for path in figures:
            device.figure(path)
        return replace(_resolve(device, arrays, figures, achieved, ideal, level, energy), swept=True)

    @property
    def size(self) -> int:
        """Number of devices or samples."""
        return len(self.device)


def _resolve(
    device: Device,
    arrays: WorkloadArrays,
    moved: Mapping[str, Array],
    achieved: Achieved | None,
    ideal: bool,
    level: str,
    energy: EnergyChoice,
) -> DeviceBatch:
    if ideal and achieved is not None:
        raise UserError("give either ideal=True or achieved, not both")
    n = max((np.size(values) for values in moved.values()), default=1)
    used: list[str] = []

    def get(path: str) -> Array:
        used.append(path)
        return np.broadcast_to(np.asarray(moved.get(path, device.figure(path).value), dtype=np.float64), (n,))

    wanted = IDEAL if ideal else achieved or Achieved()
    matrix_dtypes = sorted({dtype for dtype, flops in zip(arrays.dtype, arrays.flops, strict=True) if flops > 0})
    has_vector = bool((arrays.vector_ops > 0).any())
    moves = bool((arrays.bytes_moved > 0).any())
    unused = np.full(n, np.inf)
    op_per_s = {dtype: get(f"peak.{device.peak_key(dtype)}") for dtype in matrix_dtypes}
    vector = get(f"peak.{device.vector_key()}") if has_vector else unused
    read = get(device.bandwidth_path(level, "read")) if moves else unused
    write = get(device.bandwidth_path(level, "write")) if moves else unused
    lawful = achieved is None and not ideal and has_laws(device, arrays)
    if lawful:
        laws = shares(device, arrays, get, level)
        read = write = _fastest(device, get, laws)
        fractions = {
            "compute": laws.compute,
            "vector": laws.vector,
            "bandwidth": np.maximum(laws.bandwidth_bytes_per_s / read[:, None], np.finfo(float).tiny),
            "overhead_s": laws.overhead_s,
            "serial": laws.serial,
            "cached": laws.cached,
        }
    else:
        fractions = {
            name: _achieved(device, get, name, getattr(wanted, name), arrays.n_ops)
            for name in ("compute", "bandwidth", "overhead_s")
        }
        fractions["vector"] = fractions["compute"]
        fractions["serial"] = fractions["cached"] = np.zeros((1, 1))
    energies, missing = _energy(device, get, matrix_dtypes, has_vector, moves, level, energy, n)
    return DeviceBatch(
        device=(device.id,) * n,
        figures=tuple(dict.fromkeys(used)),
        op_per_s=op_per_s,
        vector_op_per_s=vector,
        read_bytes_per_s=read,
        write_bytes_per_s=write,
        compute_fraction=fractions["compute"],
        vector_fraction=fractions["vector"],
        bandwidth_fraction=fractions["bandwidth"],
        overhead_s=fractions["overhead_s"],
        serial=fractions["serial"],
        cached=fractions["cached"],
        energy=energies,
        energy_missing=missing,
        model_error_rel=(_error_rel(device, arrays, achieved, ideal),) * n,
        tiled=lawful,
    )


_CALIBRATED = {"compute": "compute_fraction", "bandwidth": "bandwidth_fraction", "overhead_s": "overhead"}


def _achieved(device: Device, get: Callable[[str], Array], name: str, given: float | Array | None, n_ops: int) -> Array:
    if given is not None:
        values = np.asarray(given, dtype=np.float64)
        if values.ndim > 1 or (values.ndim == 1 and values.shape != (n_ops,)):
            raise UserError(
                f"achieved {name} must be a number or one for each of the {n_ops} rows, got shape {values.shape}"
            )
        return values.reshape(1, -1)
    key = _CALIBRATED[name]
    if getattr(device.calibration, key) is None:
        raise UserError(
            f"device '{device.id}' has no calibration.{key}: give Achieved({name}=...), add the measured figure to the device, "
            "or ask for the datasheet roofline with ideal=True"
        )
    return get(f"calibration.{key}")[:, None]


def _fastest(device: Device, get: Callable[[str], Array], laws: Shares) -> Array:
    """The bandwidth that shares are of where caches take part: the fastest level's, (n,); no row exceeds it."""
    levels = [get(device.bandwidth_path(level, "read")) for level in ("dram", *device.calibration.caches)]
    return np.maximum(np.max(levels, axis=0), laws.bandwidth_bytes_per_s.max(-1))


def _error_rel(device: Device, arrays: WorkloadArrays, achieved: Achieved | None, ideal: bool) -> float | None:
    """The published error of exactly the model that is used. A calibration that hides how well it fits has none."""
    measured = device.calibration
    if ideal:
        figure = measured.roofline_error_rel
    elif achieved is not None and any(
        given is not None for given in (achieved.compute, achieved.bandwidth, achieved.overhead_s)
    ):
        return achieved.error_rel
    elif measured.fit_error_rel is None:
        figure = None
    elif measured.operators and not (achieved is None and has_laws(device, arrays)):
        figure = measured.simple_error_rel
    else:
        figure = measured.held_out_error_rel
    return figure.value if figure else None


def _energy(
    device: Device,
    get: Callable[[str], Array],
    matrix_dtypes: Sequence[str],
    has_vector: bool,
    moves: bool,
    level: str,
    choice: EnergyChoice,
    n: int,
) -> tuple[EnergyBatch | None, str]:
    zero, one = np.zeros(n), np.ones(n)
    limit = np.full(n, device.power.limit.value if device.power.limit else np.inf)
    if isinstance(choice, ConstantPower):
        power = np.full(n, choice.power_w)
        return EnergyBatch(power, dict.fromkeys(matrix_dtypes, zero), zero, zero, zero, None, limit, zero, zero), ""
    if choice == "none":
        return None, "energy was not asked for"
    if choice == "auto":
        missing = ""
        for kind in ("board", "component"):  # measured before assembled from circuit energies
            try:
                return _energy(device, get, matrix_dtypes, has_vector, moves, level, kind, n)
            except UserError as error:
                missing = missing or str(error)
        return None, f"{missing}; or give the board's power, energy=ConstantPower(...)"

    if choice not in ("board", "component"):
        raise UserError(f"unknown energy model '{choice}': choose auto, board, component, none or ConstantPower(...)")
    # All paths first: a figure counts as used only when the whole model is there.
    floor = device.energy_path(choice, "floor")
    core = {dtype: device.energy_path(choice, "per_op", device.peak_key(dtype)) for dtype in matrix_dtypes}
    vector = device.energy_path(choice, "per_op", device.vector_key()) if has_vector else ""
    read = _byte_path(device, choice, level, "read") if moves else ""
    write = _byte_path(device, choice, level, "write") if moves else ""
    cache = f"energy.{choice}.per_byte.{device.calibration.caches[0]}" if device.calibration.caches else ""
    return (
        EnergyBatch(
            floor_w=get(floor),
            core_j_per_op={dtype: get(path) for dtype, path in core.items()},
            vector_j_per_op=get(vector) if vector else zero,
            read_j_per_byte=get(read) if read else zero,
            write_j_per_byte=get(write) if write else zero,
            cache_j_per_byte=get(cache) if moves and cache in device.figures() else None,
            limit_w=get("power.limit") if device.power.limit else limit,
            clips=one if choice == "board" else zero,
            splits=one,
        ),
        "",
    )


def _byte_path(device: Device, kind: Literal["board", "component"], level: str, direction: str) -> str:
    model = device.energy.board if kind == "board" else device.energy.component
    key = f"{level}_{direction}"
    return device.energy_path(kind, "per_byte", key if model and key in model.per_byte else level)


def _concatenate(parts: Sequence[DeviceBatch]) -> DeviceBatch:
    missing = next((part.energy_missing for part in parts if part.energy is None), "")
    joined = _join([replace(part, energy=None) for part in parts] if missing else parts)
    return replace(
        joined, figures=tuple(dict.fromkeys(path for part in parts for path in part.figures)), energy_missing=missing
    )


def _join(values: Sequence[Any]) -> Any:
    """Entries of all parts behind one another: arrays along axis 0, tuples, mappings and dataclasses of these."""
    first = values[0]
    if isinstance(first, np.ndarray):
        width = max(value.shape[1] for value in values) if first.ndim == 2 else 0
        return np.concatenate([np.broadcast_to(v, (v.shape[0], width)) if width else v for v in values])
    if isinstance(first, tuple):
        return sum(values, ())
    if any(value is None for value in values):
        return None
    if isinstance(first, Mapping):
        return {key: _join([value[key] for value in values]) for key in first}
    if isinstance(first, (EnergyBatch, DeviceBatch)):
        return type(first)(
            **{field.name: _join([getattr(value, field.name) for value in values]) for field in fields(first)}
        )
    return first
