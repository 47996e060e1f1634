"""Sanity bounds that every modelled cost must satisfy. A violation is a :class:`PhysicsError` that names the bound.

Public tools have printed 1.6e17 pJ per operation and shipped unit bugs of 100x and 1000x; these bounds catch such a slip before a
verdict rests on it. All functions are vectorised: times, energies and rates have shape (n,) or are scalars.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shared.errors import UserError

Numbers = npt.NDArray[np.float64] | float

ROUNDING = 1e-9
MAX_SLOWDOWN = 1e4  # busy time over the datasheet roofline; beyond it lies a unit slip
MAX_TILE_S = 1e-5  # one tile of a matrix product on one unit
MAX_OVERHEAD_S = 1e-3  # per call; eager GPU calls cost 7e-6 to 45e-6 s
MIN_J_PER_MAC, MAX_J_PER_MAC = 1e-15, 1e-8
MAX_POWER_EXCESS = (
    3.0  # unclipped power over the limit; vector units and memory both saturated give 1.8 on the worst board
)
CAPACITY_SHARE = 0.95  # what a program can use of a memory
# Multiply and add at 7 nm per operation, J (Jouppi et al., ISCA 2021, Tab. 2: e.g. bf16 (0.21 + 0.11)e-12 / 2) over a margin of 4 for
# newer nodes. Less than this no digital device spends.
MARGIN = 4.0
MIN_J_PER_OP = {
    "int8": 0.0385e-12 / MARGIN,
    "bf16": 0.16e-12 / MARGIN,
    "fp16": 0.25e-12 / MARGIN,
    "fp32": 0.845e-12 / MARGIN,
}


class PhysicsError(Exception):
    """A modelled number lies outside what physics allows: a unit slip or a bug, never a result."""


class CapacityError(PhysicsError, UserError):
    """More memory is in use than the device has, and offloading is not modelled."""


def _require(holds: npt.NDArray[np.bool_] | bool, bound: str, **values: Numbers) -> None:
    holds = np.asarray(holds)
    if holds.all():
        return
    index = int(np.argmin(holds.reshape(-1)))
    shown = ", ".join(
        f"{name} = {np.broadcast_to(np.asarray(value), holds.shape).reshape(-1)[index]:.4g}"
        for name, value in values.items()
    )
    raise PhysicsError(f"{bound}: {shown}" + (f" (entry {index})" if holds.size > 1 else ""))


def require_time(busy_s: Numbers, roofline_s: Numbers, tiles_s: Numbers = 0.0) -> None:
    """Busy time (without call overhead) is at least max(F/peak, B/bandwidth) and within four orders of magnitude of it.

    ``tiles_s``: what whole tiles may take of products that are smaller than a tile, beyond that bound.
    """
    busy_s, roofline_s = np.asarray(busy_s), np.asarray(roofline_s)
    _require(busy_s >= roofline_s * (1 - ROUNDING), "time below the roofline", busy_s=busy_s, roofline_s=roofline_s)
    _require(
        busy_s <= roofline_s * MAX_SLOWDOWN + tiles_s,
        "time over 1e4 times the roofline",
        busy_s=busy_s,
        roofline_s=roofline_s,
    )


def require_overhead(overhead_s: Numbers) -> None:
    """The overhead of one call lies between 0 and 1 ms."""
    overhead = np.asarray(overhead_s)
    _require((overhead >= 0) & (overhead <= MAX_OVERHEAD_S), "call overhead outside 0 to 1e-3 s", overhead_s=overhead)


def require_utilisation(fraction: Numbers) -> None:
    """An achieved fraction of a peak lies in (0, 1]."""
    fraction = np.asarray(fraction)
    _require((fraction > 0) & (fraction <= 1 + ROUNDING), "utilisation outside (0, 1]", fraction=fraction)


def require_power(energy_j: Numbers, latency_s: Numbers, limit_w: Numbers, *, excess: Numbers = 1.0) -> None:
    """Energy is at most power limit x time. ``excess``: the factor allowed before a model clips at the limit."""
    energy_j, allowed_j = np.asarray(energy_j), np.asarray(limit_w) * np.asarray(latency_s) * np.asarray(excess)
    _require(
        energy_j <= allowed_j * (1 + ROUNDING), "energy over power limit x time", energy_j=energy_j, allowed_j=allowed_j
    )


def require_min_energy(energy_j: Numbers, minimum_j: Numbers) -> None:
    """Energy of the operations is at least the count of operations times the least energy known for one (:data:`MIN_J_PER_OP`)."""
    energy_j, minimum_j = np.asarray(energy_j), np.asarray(minimum_j)
    _require(
        energy_j >= minimum_j * (1 - ROUNDING),
        "energy below the least per operation",
        energy_j=energy_j,
        minimum_j=minimum_j,
    )


def require_energy_per_mac(energy_j: Numbers, macs: Numbers) -> None:
    """Energy per MAC lies between 1e-15 and 1e-8 J. Entries without MACs are left out."""
    energy_j, macs = np.asarray(energy_j, dtype=np.float64), np.asarray(macs, dtype=np.float64)
    per_mac = np.divide(energy_j, macs, out=np.full(np.broadcast(energy_j, macs).shape, 1e-12), where=macs > 0)
    _require(
        (per_mac >= MIN_J_PER_MAC) & (per_mac <= MAX_J_PER_MAC),
        "energy per MAC outside 1e-15 to 1e-8 J",
        j_per_mac=per_mac,
    )


def require_traffic(bytes_moved: Numbers, compulsory_bytes: Numbers) -> None:
    """Traffic is at least weights, inputs and outputs once."""
    bytes_moved = np.asarray(bytes_moved)
    _require(
        bytes_moved >= np.asarray(compulsory_bytes) * (1 - ROUNDING),
        "bytes moved below the compulsory traffic",
        bytes_moved=bytes_moved,
        compulsory_bytes=compulsory_bytes,
    )


def require_fits(bytes_in_use: float, capacity_bytes: float, where: str = "memory") -> None:
    """Memory in use is at most 95 % of the capacity. Raises :class:`CapacityError`, which is a UserError too."""
    if bytes_in_use > capacity_bytes * CAPACITY_SHARE:
        raise CapacityError(
            f"{bytes_in_use:.4g} bytes do not fit into {CAPACITY_SHARE:.0%} of the {capacity_bytes:.4g} bytes of {where}: "
            "take a smaller model or batch, or model offloading"
        )


def require_monotone(values: Numbers, *, rising: bool, what: str) -> None:
    """Along a sweep (last axis) the values never fall (``rising``) or never rise: more operations never cost less, say."""
    steps = np.diff(np.asarray(values, dtype=np.float64), axis=-1) * (1 if rising else -1)
    slack = ROUNDING * np.abs(np.asarray(values, dtype=np.float64)[..., 1:])
    _require(steps >= -slack, f"{what} must never {'fall' if rising else 'rise'}", step=steps)
