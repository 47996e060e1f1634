"""A kernel-by-kernel GPU model of the ViT encoder: why a mixture of experts at equal FLOPs is slow at batch 1 (Tab. 4).

latency = Σ max(FLOP / peak, bytes / bandwidth) + kernels · launch time. A sanity check of the published GPU rows, never fitted to
them: it says how much of the gap between dense and MoE launches can explain, and what a grouped matrix product would save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from papers.m3vit import counts
from papers.m3vit.counts import Encoder
from shared.errors import unknown

Execution: TypeAlias = Literal["looped", "grouped"]
EXECUTIONS: tuple[str, ...] = get_args(Execution)


@dataclass(frozen=True)
class Kernel:
    """``launches`` equal kernels; ``macs`` and ``values`` (read and written) of one launch."""

    name: str
    macs: float
    values: float
    launches: int = 1


@dataclass(frozen=True)
class GpuLatency:
    """Modelled latency of one encoder pass in seconds."""

    work_s: float
    launch_s: float
    kernels: int

    @property
    def total_s(self) -> float:
        """Work and launches, one after the other."""
        return self.work_s + self.launch_s


def _linear(name: str, rows: float, inputs: float, outputs: float, launches: int = 1, groups: int = 1) -> Kernel:
    values = rows * (inputs + outputs) + groups * inputs * outputs
    return Kernel(name, rows * inputs * outputs, values, launches)


def _pointwise(name: str, values: float, launches: int = 1) -> Kernel:
    return Kernel(name, 0.0, values, launches)


def _attention(encoder: Encoder, tokens: int, heads: int) -> list[Kernel]:
    t, d = float(tokens), float(encoder.dim)
    scores = heads * t * t
    return [
        _pointwise("norm", 2 * t * d),
        _linear("qkv", t, d, 3 * d),
        Kernel("q·kᵀ", t * t * d, 2 * t * d + scores),
        _pointwise("softmax", 2 * scores),
        Kernel("a·v", t * t * d, 2 * t * d + scores),
        _linear("projection", t, d, d),
        _pointwise("add", 3 * t * d),
    ]


def _mlp(encoder: Encoder, tokens: int) -> list[Kernel]:
    t, d, h = float(tokens), float(encoder.dim), float(encoder.mlp_hidden)
    return [
        _pointwise("norm", 2 * t * d),
        _linear("fc1", t, d, h),
        _pointwise("gelu", 2 * t * h),
        _linear("fc2", t, h, d),
        _pointwise("add", 3 * t * d),
    ]


def _moe(encoder: Encoder, tokens: int, execution: Execution) -> list[Kernel]:
    t, d, h = float(tokens), float(encoder.dim), float(encoder.expert_hidden)
    n, k = int(encoder.num_experts), int(encoder.top_k)
    router = [
        _pointwise("norm", 2 * t * d),
        _linear("router", t, d, n),
        _pointwise("softmax", 2 * t * n),
        _pointwise("top-k", t * (n + 2 * k)),
    ]
    if execution == "looped":  # one pass per expert over its own tokens: the work is the same, in N pieces
        rows, pieces = k * t / n, n
        select = [_pointwise("select", t * k, n), _pointwise("gather", 2 * rows * d, n)]
    else:  # one sort, then one product over all experts' tokens
        rows, pieces = k * t, 1
        select = [_pointwise("sort", 2 * k * t, 2), _pointwise("gather", 2 * rows * d)]
    groups = n // pieces
    return [
        *router,
        *select,
        _linear("expert fc1", rows, d, h, pieces, groups),
        _pointwise("expert gelu", 2 * rows * h, pieces),
        _linear("expert fc2", rows, h, d, pieces, groups),
        _pointwise("gate", 2 * rows * d, pieces),
        _pointwise("scatter", 3 * rows * d, pieces),
        _pointwise("add", 3 * t * d),
    ]


def encoder_kernels(encoder: Encoder, tokens: int, *, heads: int, execution: Execution = "looped") -> list[Kernel]:
    """Kernels of one encoder pass with biases fused and attention scores written out (as in 2022); balanced routing.

    ``execution`` says how an MoE block runs: ``looped`` over its experts or ``grouped``; a dense encoder has none. Raises
    UserError for an unknown execution.
    """
    if execution not in EXECUTIONS:
        raise unknown("execution", execution, EXECUTIONS)
    t, d = float(tokens), float(encoder.dim)
    kernels = [_linear("patch embedding", t - 1, float(encoder.patch_values), d), _pointwise("positions", 3 * t * d)]
    for block in range(encoder.depth):
        moe = block % 2 == 1 and block // 2 < encoder.num_moe_blocks
        kernels += _attention(encoder, tokens, heads)
        kernels += _moe(encoder, tokens, execution) if moe else _mlp(encoder, tokens)
    return kernels


def gpu_latency(
    kernels: Sequence[Kernel],
    *,
    peak_flop_per_s: float,
    bandwidth_bytes_per_s: float,
    launch_s: float,
    bytes_per_value: int,
) -> GpuLatency:
    """Roofline time of every kernel plus a launch each; 1 MAC is 2 FLOPs."""
    work = sum(
        k.launches * max(2.0 * k.macs / peak_flop_per_s, k.values * bytes_per_value / bandwidth_bytes_per_s)
        for k in kernels
    )
    count = sum(k.launches for k in kernels)
    return GpuLatency(work, count * launch_s, count)


def overhead_per_expert_s(moe_latency_s: float, dense_latency_s: float, encoder: Encoder) -> float:
    """What one expert of one layer adds to a measured latency at unchanged FLOPs (155 µs in Tab. 4, PASCAL)."""
    return (moe_latency_s - dense_latency_s) / (encoder.num_moe_blocks * float(encoder.num_experts))


def achieved_flop_per_s(encoder: Encoder, tokens: int, latency_s: float) -> float:
    """FLOP/s of an encoder pass of known latency."""
    return 2.0 * float(counts.sum_counts(counts.encoder_macs(encoder, tokens))) / latency_s
