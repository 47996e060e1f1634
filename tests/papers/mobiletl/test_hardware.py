"""The modelled training step: what costs what, by hand, on a device of round numbers."""

from __future__ import annotations

import pytest
import torch

from papers.mobiletl.counts import block_roles, roles, trace_layers
from papers.mobiletl.hardware import Assumptions, latency_by_phase, step_cost, step_rows
from papers.mobiletl.models import create, fig1_block
from shared.hardware import load_device
from shared.hardware.batch import ConstantPower

_ASSUMED = Assumptions(0.35, 0.10, 0.43, 2e-5)


def test_rows_of_a_block() -> None:
    """Three convolutions forward, six products backward but for the lowest input gradient: 2 · (3 · 3 - 1 of expand) MACs' worth."""
    layers = trace_layers(fig1_block("v2"), (8, 96, 7, 7))
    rows = step_rows(layers, block_roles(layers, "mobiletl"))
    expand, depthwise, project = 8 * 49 * 96 * 576, 8 * 49 * 576 * 25, 8 * 49 * 96 * 576
    assert sum(row["flops"] for row in rows) == 2 * (2 * expand + 3 * depthwise + 3 * project)
    inner = [row for row in rows if row["name"] in ("bn1", "bn2")]
    n = 8 * 576 * 49
    assert sorted(row["bytes_read"] + row["bytes_written"] for row in inner) == [8 * n + n / 8] * 4
    assert [row["phase"] for row in rows].index("backward") > 0
    assert rows[-1]["bytes_read"] == 16 * (2 * 96 * 576 + 25 * 576 + 2 * 576 + 2 * 96)


def test_a_pointwise_row_by_hand() -> None:
    """2 MAC / (0.35 · 48 GFLOP/s) against bytes / (0.43 · 12.8 GB/s), the larger, and 20 µs."""
    layers = trace_layers(fig1_block("v2"), (8, 96, 7, 7))
    rows = [row for row in step_rows(layers, block_roles(layers, "ft_blocks")) if row["name"] == "conv_pw"]
    result = step_cost(rows, load_device("raspberry_pi_4b"), _ASSUMED)
    macs, moved = 8 * 49 * 96 * 576, 4 * (8 * 96 * 49 + 8 * 576 * 49 + 96 * 576)
    assert result.latency_s == pytest.approx(max(2 * macs / (0.35 * 4.8e10), moved / (0.43 * 1.28e10)) + 2e-5)


def test_order_of_the_methods_and_the_phases() -> None:
    with torch.device("meta"):
        model = create("mbv3_small")
    layers = trace_layers(model, (8, 3, 224, 224))
    device = load_device("raspberry_pi_4b")
    seconds = {}
    for method in ("ft_all", "ft_blocks", "mobiletl", "last"):
        rows = step_rows(layers, roles(model, layers, method, 5))
        result = step_cost(rows, device, _ASSUMED, energy=ConstantPower(6.4))
        seconds[method] = result.latency_s
        assert result.energy_j == pytest.approx(6.4 * result.latency_s)
        assert sum(latency_by_phase(rows, result).values()) == pytest.approx(result.latency_s)
    assert seconds["last"] < seconds["mobiletl"] < seconds["ft_blocks"] < seconds["ft_all"]


def test_band_stops_at_the_peak() -> None:
    assert _ASSUMED.scaled(4.0).pointwise_fraction == 1.0
    assert _ASSUMED.scaled(0.5) == Assumptions(0.175, 0.05, 0.215, 2e-5)
