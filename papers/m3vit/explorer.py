"""Design-space exploration with the accelerator model: all points of a grid in one vectorised call.

Axes are the model's N, K, h, D and the accelerator's multipliers, clock, DRAM bandwidth, weight width and power. The routing
is balanced (mean queue K·T/N); what imbalance adds is bounded by the stall probability that is reported beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from papers.m3vit import counts, hardware
from papers.m3vit.counts import Encoder
from papers.m3vit.hardware import Accelerator
from shared.errors import UserError, unknown

Points: TypeAlias = dict[str, NDArray[Any]]

MODEL_AXES = ("dim", "num_experts", "top_k", "expert_hidden", "tokens")
DEVICE_AXES = (
    "macs_per_cycle",
    "attention_macs_per_cycle",
    "clock_hz",
    "bandwidth_bytes_per_s",
    "power_w",
    "weight_bits",
    "router_drain_cycles",
)
AXES = (*MODEL_AXES, *DEVICE_AXES)


def grid(**axes: ArrayLike) -> Points:
    """The Cartesian product of the axes, one flat array of points per axis. Raises UserError for an unknown axis."""
    for name in axes:
        if name not in AXES:
            raise unknown("axis", name, AXES)
    mesh = np.meshgrid(*(np.atleast_1d(np.asarray(values)) for values in axes.values()), indexing="ij")
    return {name: values.ravel() for name, values in zip(axes, mesh, strict=True)}


def evaluate(points: Mapping[str, ArrayLike], *, out_channels: int = 21) -> Points:
    """Cost of every design point; the axes of :data:`AXES` broadcast against each other, and all must be given.

    The dense blocks keep their hidden size of 4·D. Returns arrays: ``latency_s`` and ``energy_j`` of the reordered design,
    ``cached_latency_s`` (random routing), ``reordering_speedup``, ``dense_latency_s``, ``with_decoder_latency_s`` (one decoder of
    ``out_channels``), ``memory_bytes``, ``memory_ratio`` (all experts resident over reordered), ``stall_threshold_tokens``,
    ``mean_queue_tokens``, ``stall_probability`` (random routing), ``critical_bandwidth_bytes_per_s``, ``loads_hidden``.
    """
    missing = [name for name in AXES if name not in points]
    if missing:
        raise UserError(f"design points lack the axes {', '.join(missing)}: give every axis a value or an array")
    shape_of = {name: np.asarray(points[name], dtype=np.int64) for name in MODEL_AXES}
    rates = {name: np.asarray(points[name], dtype=np.float64) for name in DEVICE_AXES}
    dim, tokens = shape_of["dim"], shape_of["tokens"]
    encoder = Encoder(
        dim=dim,
        mlp_hidden=4 * dim,
        num_experts=shape_of["num_experts"],
        top_k=shape_of["top_k"],
        expert_hidden=shape_of["expert_hidden"],
    )
    accelerator = Accelerator.from_array(**rates)
    latency = hardware.frame_latency(encoder, tokens, accelerator, design="reordered").total_s
    cached = hardware.frame_latency(encoder, tokens, accelerator, design="cached").total_s
    decoder = hardware.decoder_latency_s(counts.decoder_macs(dim, tokens - 1, out_channels) * 1.0, accelerator)
    memory = hardware.memory_bytes(encoder, tokens, "reordered", accelerator.weight_bits)
    resident = hardware.memory_bytes(encoder, tokens, "resident", accelerator.weight_bits)
    threshold = hardware.stall_threshold_tokens(encoder, accelerator)
    queue = hardware.mean_queue(encoder, tokens)
    results: Mapping[str, ArrayLike] = {
        "latency_s": latency,
        "energy_j": hardware.energy_j(latency, accelerator.power_w),
        "cached_latency_s": cached,
        "reordering_speedup": cached / latency,
        "dense_latency_s": hardware.compute_latency(encoder.dense(), tokens, accelerator).total_s,
        "with_decoder_latency_s": latency + decoder,
        "memory_bytes": memory,
        "memory_ratio": resident / memory,
        "stall_threshold_tokens": threshold,
        "mean_queue_tokens": queue,
        "stall_probability": hardware.random_stall_probability(encoder, tokens, accelerator),
        "critical_bandwidth_bytes_per_s": hardware.critical_bandwidth_bytes_per_s(encoder, tokens, accelerator),
        "loads_hidden": queue >= threshold,
    }
    shape = np.broadcast_shapes(*(np.shape(points[name]) for name in AXES))
    return {name: np.broadcast_to(np.asarray(value), shape) for name, value in results.items()}
