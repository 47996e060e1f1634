"""Loading beside computing: double buffers, and weights streamed over a chain of links.

All functions are vectorised over leading axes; the last axis is the sequence of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def double_buffered_latency(
    compute_s: npt.ArrayLike,
    load_s: npt.ArrayLike,
    first_load_exposed: bool = False,
    valid: npt.ArrayLike | None = None,
) -> Array:
    """Time of M steps with two buffers: while step i computes, the data of step i+1 load into the other buffer.

    t = [l_1 if exposed] + sum over i < M of max(c_i, l_(i+1)) + c_M.

    Args:
        compute_s: (..., M) compute time of each step, s.
        load_s: load time of each step's data, broadcast against ``compute_s``, s.
        first_load_exposed: count the first load; else it is hidden behind earlier work.
        valid: (..., M) booleans; steps that are not valid (an empty queue) neither load nor compute.

    Returns:
        Latency, s, of shape (...): 0 where no step is valid.
    """
    compute, load = np.broadcast_arrays(np.asarray(compute_s, np.float64), np.asarray(load_s, np.float64))
    if (compute < 0).any() or (load < 0).any():
        raise ValueError("times must not be negative")
    if compute.ndim == 0:
        raise ValueError("compute_s needs an axis of steps")
    if valid is not None:
        keep = np.broadcast_to(np.asarray(valid, bool), compute.shape)
        order = np.argsort(~keep, axis=-1, kind="stable")  # valid steps first, in their order
        keep = np.take_along_axis(keep, order, -1)
        compute = np.where(keep, np.take_along_axis(compute, order, -1), 0.0)
        load = np.where(keep, np.take_along_axis(load, order, -1), 0.0)
    if compute.shape[-1] == 0:
        return np.zeros(compute.shape[:-1])
    total = np.maximum(compute[..., :-1], load[..., 1:]).sum(-1) + compute[..., -1]
    return total + load[..., 0] if first_load_exposed else total


@dataclass(frozen=True)
class Hop:
    """One link of a chain (flash to DRAM, host to device): bytes per second, and seconds per transfer."""

    bandwidth_bytes_per_s: float
    latency_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bandwidth_bytes_per_s > 0 and self.latency_s >= 0):
            raise ValueError("a hop needs a positive bandwidth and a latency that is not negative")


def transfer_s(size_bytes: npt.ArrayLike, hops: Sequence[Hop], *, pipelined: bool = True) -> Array:
    """Time of a transfer over a chain of links, s, of the shape of ``size_bytes``; nothing moves in no time.

    ``pipelined``: the links work at once on successive pieces, so the slowest sets the rate and each adds its latency; else every
    link waits for the whole transfer of the one before (store and forward).
    """
    size = np.asarray(size_bytes, np.float64)
    if not hops:
        raise ValueError("a transfer needs at least one hop")
    if (size < 0).any():
        raise ValueError("sizes must not be negative")
    inverse = [1 / hop.bandwidth_bytes_per_s for hop in hops]
    per_byte = max(inverse) if pipelined else sum(inverse)
    return np.where(size > 0, size * per_byte + sum(hop.latency_s for hop in hops), 0.0)


def streamed_latency(
    compute_s: npt.ArrayLike,
    weight_bytes: npt.ArrayLike,
    hops: Sequence[Hop],
    *,
    resident: npt.ArrayLike = 0.0,
    overlap: bool = True,
    pipelined: bool = True,
    first_load_exposed: bool = True,
) -> Array:
    """Latency of layers whose weights are streamed in while the layer before computes (offloading).

    Args:
        compute_s: (..., L) compute time of each layer with its weights at hand, s.
        weight_bytes: weights of each layer, broadcast against ``compute_s``, bytes.
        hops: the links between where the weights lie and where they are used.
        resident: fraction in [0, 1] of each layer's weights that need not be moved.
        overlap: load the next layer during this one (two buffers); else load, then compute.
    """
    share = np.asarray(resident, np.float64)
    if ((share < 0) | (share > 1)).any():
        raise ValueError("resident is a fraction in [0, 1]")
    load = transfer_s(np.asarray(weight_bytes, np.float64) * (1 - share), hops, pipelined=pipelined)
    if overlap:
        return double_buffered_latency(compute_s, load, first_load_exposed)
    compute, load = np.broadcast_arrays(np.asarray(compute_s, np.float64), load)
    total = (compute + load).sum(-1)
    return total if first_load_exposed else total - load[..., 0]
