"""What a layer costs on a device: roofline of one GPU, expert parallelism, energy, and the law behind the paper's milliseconds.

Everything is per MoE layer and forward pass and vectorised over ``rho``, the FFN share of the assignments. bf16, 1 MAC = 2 FLOPs.
No constant comes from the paper's Tab. 3; :func:`affine_law` describes that table and is judged on the row that it was not fitted to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from papers.moepp.shape import Shape
from shared.hardware import AlphaBeta, Device

Array = npt.NDArray[np.float64]
BYTES = 2  # bf16


@dataclass(frozen=True)
class Assumed:
    """What no data sheet says.

    ``fused``: gather and SwiGLU happen inside the products and the mix inside the combine, as in our kernels; otherwise they are passes
    of their own, as in a plain implementation. ``launch_s`` counts where the device publishes no overhead per call.
    """

    fused: bool = True
    launches: int = 6  # count, place, gather, two products, combine
    launch_s: float = 2e-6
    compute_fraction: float = 0.6  # of the peak, for grouped products, where the device has no calibration
    bandwidth_fraction: float = 0.8


@dataclass(frozen=True)
class LayerCost:
    """Seconds and bytes of one layer, each an array over rho."""

    gemm_s: Array
    pointwise_s: Array
    weights_s: Array
    combine_s: Array
    launch_s: Array
    flops: Array
    bytes_moved: Array

    @property
    def total_s(self) -> Array:
        return self.gemm_s + self.pointwise_s + self.weights_s + self.combine_s + self.launch_s


def rates(device: Device, assumed: Assumed) -> tuple[float, float, float]:
    """Reached FLOP/s, bytes/s and seconds per launch of a device in bf16, from its calibration where it has one.

    Raises:
        UserError: the device has no bf16 rate or no DRAM.
    """
    measured = device.calibration
    compute = measured.compute_fraction.value if measured and measured.compute_fraction else assumed.compute_fraction
    memory = (
        measured.bandwidth_fraction.value if measured and measured.bandwidth_fraction else assumed.bandwidth_fraction
    )
    launch = measured.overhead.value if measured and measured.overhead else assumed.launch_s
    return device.op_per_s("bfloat16") * compute, device.bandwidth_bytes_per_s() * memory, launch


def layer_cost(shape: Shape, rho: npt.ArrayLike, tokens: int, device: Device, assumed: Assumed) -> LayerCost:
    """t = 6·R·d·h/F + [R·(row bytes) + 6·E·d·h]/B + 4·d·T/B + launches, R = rho·K·T rows.

    Row bytes: gather 4·d, combine read 2·d, and without fusion the SwiGLU's 6·h. The combine reads x and writes y, which is all that
    zero-computation experts cost.
    """
    share = np.atleast_1d(np.asarray(rho, np.float64))
    d, h, experts = shape.d_model, shape.d_expert, shape.experts.ffn
    compute, bandwidth, launch = rates(device, assumed)
    rows = share * shape.k * tokens
    flops = 6.0 * rows * d * h
    per_row = BYTES * 3.0 * d + (0.0 if assumed.fused else BYTES * 3.0 * h)
    weights = np.full_like(share, BYTES * 3.0 * experts * d * h)
    combine = np.full_like(share, BYTES * 2.0 * d * tokens)
    return LayerCost(
        gemm_s=flops / compute,
        pointwise_s=rows * per_row / bandwidth,
        weights_s=weights / bandwidth,
        combine_s=combine / bandwidth,
        launch_s=np.full_like(share, assumed.launches * launch),
        flops=flops,
        bytes_moved=rows * per_row + weights + combine,
    )


def speedup(shape: Shape, taus: Sequence[float], tokens: int, device: Device, assumed: Assumed) -> Array:
    """Expert forward time of the vanilla layer over that of MoE++ at each tau, same kernels."""
    rho = np.array([shape.rho(tau) for tau in taus])
    vanilla = layer_cost(shape, 1.0, tokens, device, assumed).total_s
    return vanilla / layer_cost(shape, rho, tokens, device, assumed).total_s


def energy_j_per_token(shape: Shape, rho: npt.ArrayLike, tokens: int, device: Device, assumed: Assumed) -> Array:
    """Energy of one token in all layers: FLOPs at limit power over peak, plus DRAM traffic.

    Raises:
        UserError: the device has no power limit or no DRAM energy.
    """
    cost = layer_cost(shape, rho, tokens, device, assumed)
    per_flop = device.power_w("limit") / device.op_per_s("bfloat16")
    per_byte = device.energy_j_per_byte("dram", "component")
    return shape.layers * (cost.flops * per_flop + cost.bytes_moved * per_byte) / tokens


def all_to_all_bytes(shape: Shape, rho: npt.ArrayLike, tokens: int, ranks: int) -> Array:
    """Bytes that one rank sends in one all-to-all with ``tokens`` on each rank: rho·K·T·d·2·(P-1)/P; dispatch and combine are one each.

    Zero-computation assignments stay at home, so the ratio to the vanilla layer is rho.
    """
    share = np.asarray(rho, np.float64)
    return share * shape.k * tokens * shape.d_model * BYTES * (ranks - 1) / ranks


def expert_parallel_s(
    shape: Shape, rho: npt.ArrayLike, tokens: int, ranks: int, device: Device, link: AlphaBeta, assumed: Assumed
) -> Array:
    """One layer on ``ranks`` devices with ``tokens`` on each: local cost plus dispatch and combine, the mix hidden under the dispatch."""
    local = layer_cost(shape, rho, tokens, device, assumed)
    held = shape.k * tokens * shape.d_model * BYTES * np.atleast_1d(np.asarray(rho, np.float64))
    exchange = 2.0 * link.all_to_all_s(held, ranks)
    weights = local.weights_s / ranks
    hidden = np.minimum(local.combine_s, exchange / 2.0)
    return local.gemm_s + local.pointwise_s + weights + local.combine_s + local.launch_s + exchange - hidden


def affine_law(rho: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Least squares a and b of t = a + b·rho; a is what does not shrink with the number of FFN assignments."""
    slope, intercept = np.polyfit(np.asarray(rho, np.float64), np.asarray(seconds, np.float64), 1)
    return float(intercept), float(slope)


def sampled_share(shape: Shape, tau: float) -> float:
    """FFN share when two experts are drawn without replacement with probabilities proportional to 1/eta: not rho, unless tau is 1."""
    weights = np.array([1.0 / eta for eta in shape.experts.eta(tau)])
    p = weights / weights.sum()
    ffn = np.arange(len(p)) < shape.experts.ffn
    second = np.array([(p * ffn).sum() - (p * ffn)[i] for i in range(len(p))]) / (1.0 - p)
    return float(((p * ffn).sum() + (p * second).sum()) / 2.0)
