"""Design-space explorer, GPU model and the Edge-MoE point: agreement with the accelerator model and with published rows."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from papers.m3vit import counts, edge_moe, explorer, gpu, hardware
from papers.m3vit.counts import ENCODERS, Encoder
from papers.m3vit.hardware import Accelerator
from shared.errors import UserError

SMALL = ENCODERS["small"]
PASCAL = 1025

POINT = {
    "dim": 384,
    "num_experts": 16,
    "top_k": 4,
    "expert_hidden": 384,
    "tokens": PASCAL,
    "macs_per_cycle": 1536.0,
    "attention_macs_per_cycle": 1536.0,
    "clock_hz": 3e8,
    "bandwidth_bytes_per_s": 1.92e10,
    "power_w": 10.0,
    "weight_bits": 16.0,
    "router_drain_cycles": 1.0,
}
ZCU104 = Accelerator.from_array(**{name: POINT[name] for name in explorer.DEVICE_AXES})


def test_explorer_at_the_papers_point() -> None:
    cost = explorer.evaluate(POINT)
    assert 1e3 * float(cost["latency_s"]) == pytest.approx(
        1e3 * (768 * 384 * 1024 + 12 * (12 * 1025 * 384**2 + 2 * 1025**2 * 384)) / 1536 / 3e8 + 0.1025
    )
    assert round(float(cost["reordering_speedup"]), 2) == 9.24
    assert round(float(cost["memory_ratio"]), 3) == 2.437
    assert bool(cost["loads_hidden"])


@given(
    n=st.integers(1, 64),
    k=st.integers(1, 8),
    hidden=st.integers(16, 1024),
    bandwidth=st.floats(1e8, 1e11),
    bits=st.sampled_from([4, 8, 16]),
)
def test_explorer_equals_real_balanced_queues(n: int, k: int, hidden: int, bandwidth: float, bits: int) -> None:
    """A whole number of tokens per expert, through the schedule on real queues, gives the explorer's latency."""
    k = min(k, n)
    axes = {"num_experts": n, "top_k": k, "expert_hidden": hidden, "bandwidth_bytes_per_s": bandwidth}
    cost = explorer.evaluate({**POINT, **axes, "weight_bits": bits, "tokens": 8 * n})
    encoder = Encoder(num_experts=n, top_k=k, expert_hidden=hidden)
    device = replace(ZCU104, bandwidth_bytes_per_s=bandwidth, weight_bits=bits)
    queues = np.full((6, n), 8 * k)
    real = hardware.frame_latency(encoder, 8 * n, device, design="reordered", queues=queues)
    assert float(cost["latency_s"]) == pytest.approx(float(real.total_s), rel=1e-9)


def test_explorer_is_fast() -> None:
    points = explorer.grid(
        **{name: [value] for name, value in POINT.items() if name not in ("num_experts", "bandwidth_bytes_per_s")},
        num_experts=np.arange(8, 108),
        bandwidth_bytes_per_s=np.linspace(1e9, 3e10, 1000),
    )
    start = time.perf_counter()
    cost = explorer.evaluate(points)
    assert cost["latency_s"].shape == (100_000,)
    assert time.perf_counter() - start < 1.0


# --- GPU and Edge-MoE ---


def test_gpu_kernels_do_the_encoders_work() -> None:
    for encoder in (SMALL, SMALL.dense()):
        want = counts.sum_counts(counts.encoder_macs(encoder, PASCAL))
        for execution in gpu.EXECUTIONS:
            kernels = gpu.encoder_kernels(encoder, PASCAL, heads=12, execution=execution)
            assert sum(k.launches * k.macs for k in kernels) == pytest.approx(want, rel=1e-12)


def test_looped_experts_are_slower_than_dense_and_grouping_closes_the_gap() -> None:
    rtx = {"peak_flop_per_s": 16.3e12, "bandwidth_bytes_per_s": 672e9, "launch_s": 5e-6, "bytes_per_value": 4}
    dense, looped, grouped = (
        gpu.gpu_latency(gpu.encoder_kernels(encoder, PASCAL, heads=12, execution=how), **rtx)
        for encoder, how in ((SMALL.dense(), "looped"), (SMALL, "looped"), (SMALL, "grouped"))
    )
    assert dense.total_s < grouped.total_s < looped.total_s
    assert looped.kernels - grouped.kernels > 6 * 16 * 6
    assert dense.total_s < 10.381e-3  # a roofline is a lower bound of the measured latency
    assert looped.total_s < 25.239e-3


def test_gpu_rows_of_tab_4() -> None:
    assert 1e6 * gpu.overhead_per_expert_s(25.239e-3, 10.381e-3, SMALL) == pytest.approx(155, abs=0.5)
    assert gpu.achieved_flop_per_s(SMALL.dense(), PASCAL, 10.381e-3) == pytest.approx(6.1e12, rel=0.01)


UNITS = edge_moe.Units(3.0e8, 256, 32, 128, 128, 32, 2)


def test_edge_moe_counts_and_units() -> None:
    assert edge_moe.TOKENS == 129
    assert round(edge_moe.macs() / 1e9, 3) == 0.783
    assert edge_moe.token_s(UNITS) * 3e8 == pytest.approx(576)
    assert edge_moe.load_s(UNITS) * 3e8 == pytest.approx((2 * 192 * 384 + 576) / 16)


def test_edge_moe_explains_half_of_the_measured_latency() -> None:
    """A board reaches half of what the multiplier array could do: 34.64 ms measured."""
    latency = edge_moe.latency(UNITS, np.full((6, 16), 129 * 2 / 16))
    assert latency.exposed_load_s == 0.0
    assert 0.45 < latency.total_s / 34.64e-3 < 0.55
    assert latency.mlp_s == latency.experts_s  # K·h is the dense hidden size
    # 6 layers x (2 + 128·2·14/16) misses
    assert latency.token_order_load_s == pytest.approx(6 * 226 * edge_moe.load_s(UNITS))


# --- bad input ---


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(UserError, match="clock_hz"):
        explorer.evaluate({name: value for name, value in POINT.items() if name != "clock_hz"})
    with pytest.raises(UserError, match="num_experts"):
        explorer.grid(num_expert=[1])
    with pytest.raises(UserError, match="grouped"):
        gpu.encoder_kernels(SMALL, PASCAL, heads=12, execution="group")  # type: ignore[arg-type]
