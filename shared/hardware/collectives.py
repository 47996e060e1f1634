"""Collectives in the alpha-beta model: t = startup + bytes on the busiest link / bandwidth.

Ring algorithms (Patarasuk and Yuan, 2009): the bytes that each rank sends for a tensor of S bytes are 2 (n-1)/n S for an all-reduce
and (n-1)/n S for reduce-scatter, all-gather and all-to-all; broadcast and point-to-point send S. Dividing by the bandwidth of a link
makes ``bandwidth_bytes_per_s`` what measurements call bus bandwidth. Topology changes it by a factor of 8, so it is a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.errors import UserError, unknown
from shared.hardware.device import Device

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AlphaBeta:
    """A link model. ``alpha_s`` is the startup of a ``call`` as fits report it, or of each ``step`` of the ring."""

    bandwidth_bytes_per_s: float
    alpha_s: float
    alpha_per: Literal["call", "step"] = "call"

    def __post_init__(self) -> None:
        if not (self.bandwidth_bytes_per_s > 0 and self.alpha_s >= 0):
            raise ValueError("alpha-beta needs a positive bandwidth and an alpha that is not negative")
        if self.alpha_per not in ("call", "step"):
            raise ValueError("alpha_per is call or step")

    @classmethod
    def of(cls, device: Device, topology: str, alpha_s: float | None = None) -> AlphaBeta:
        """The fit of a device at one topology (``device.collective``), its alpha being that of a call.

        Raises UserError for a topology that the device has no fit for, and for a fit without alpha unless ``alpha_s`` is given.
        """
        if topology not in device.collective:
            raise unknown(f"collective topology of device '{device.id}'", topology, device.collective)
        fit = device.collective[topology]
        if alpha_s is None:
            if fit.alpha is None:
                raise UserError(f"device '{device.id}' has no alpha for topology {topology}: give alpha_s")
            alpha_s = fit.alpha.value
        return cls(fit.bandwidth.value, alpha_s)

    def all_reduce_s(self, size_bytes: npt.ArrayLike, ranks: npt.ArrayLike) -> Array:
        """Ring all-reduce of a tensor of ``size_bytes`` that every rank holds, s."""
        n = _ranks(ranks)
        return self._time(size_bytes, n, steps=2 * (n - 1), share=2 * (n - 1) / n)

    def reduce_scatter_s(self, size_bytes: npt.ArrayLike, ranks: npt.ArrayLike) -> Array:
        """Ring reduce-scatter of a tensor of ``size_bytes`` that every rank holds, s."""
        n = _ranks(ranks)
        return self._time(size_bytes, n, steps=n - 1, share=(n - 1) / n)

    def all_gather_s(self, size_bytes: npt.ArrayLike, ranks: npt.ArrayLike) -> Array:
        """Ring all-gather whose **result** has ``size_bytes``, s."""
        n = _ranks(ranks)
        return self._time(size_bytes, n, steps=n - 1, share=(n - 1) / n)

    def all_to_all_s(self, size_bytes: npt.ArrayLike, ranks: npt.ArrayLike) -> Array:
        """All-to-all of ``size_bytes`` held by each rank, an equal share (also its own) for each rank, s."""
        n = _ranks(ranks)
        return self._time(size_bytes, n, steps=n - 1, share=(n - 1) / n)

    def broadcast_s(self, size_bytes: npt.ArrayLike, ranks: npt.ArrayLike) -> Array:
        """Pipelined ring broadcast of ``size_bytes``, s."""
        n = _ranks(ranks)
        return self._time(size_bytes, n, steps=n - 1, share=np.where(n > 1, 1.0, 0.0))

    def point_to_point_s(self, size_bytes: npt.ArrayLike) -> Array:
        """One message of ``size_bytes`` from one rank to another, s."""
        return self._time(size_bytes, np.asarray(2.0), steps=np.asarray(1.0), share=np.asarray(1.0))

    def _time(self, size_bytes: npt.ArrayLike, n: Array, *, steps: Array, share: Array) -> Array:
        size = np.asarray(size_bytes, np.float64)
        if (size < 0).any():
            raise ValueError("sizes must not be negative")
        startups = steps if self.alpha_per == "step" else np.where(n > 1, 1.0, 0.0)
        return startups * self.alpha_s + share * size / self.bandwidth_bytes_per_s


def _ranks(ranks: npt.ArrayLike) -> Array:
    n = np.asarray(ranks, np.float64)
    if (n < 1).any() or (n != np.floor(n)).any():
        raise ValueError("ranks are whole numbers of at least 1")
    return n
