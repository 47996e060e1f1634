"""Parameter and MAC counts of the public code and of config A, worked out by hand in the paper's tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from papers.switchnerf import counts
from papers.switchnerf.hmohe import CONFIG_A
from papers.switchnerf.switch import NeRFMLP, SwitchConfig, SwitchNeRF, background


def test_switch_nerf_parameters_by_part() -> None:
    net = SwitchNeRF(SwitchConfig())
    assert counts.parameters(net.embed) == 19_456
    assert counts.parameters(net.gate) == 134_144
    assert counts.parameters(net.experts) == 8 * 460_544
    assert counts.parameters(net.head, ("appearance",)) == 257 + 65_792 + 42_496 + 387
    assert counts.switch_parameters() == 3_946_884
    assert counts.switch_parameters(images=1940) == 4_754_056


def test_plain_networks() -> None:
    assert counts.parameters(NeRFMLP(), ("appearance",)) == 608_132
    assert counts.parameters(background(SwitchConfig()), ("appearance",)) == 620_932
    assert counts.mega_parameters() == 9_832_512
    assert counts.plain_macs(3) == 605_696
    assert counts.plain_macs(4) == 618_496


def test_switch_nerf_macs() -> None:
    by_hand = 75 * 256 + (2 * 256 * 256 + 256 * 8) + 7 * 256 * 256 + 256 + 256 * 256 + 331 * 128 + 128 * 3
    assert counts.switch_macs() == by_hand == 719_616
    assert counts.switch_gate_macs() == 133_120
    assert counts.switch_ray_flops(False) == 2 * 719_616 * 768 == 1_105_330_176
    assert counts.switch_ray_flops(True) == 1_105_330_176 + 2 * 618_496 * 384


def test_only_the_gates_last_layer_grows_with_the_experts() -> None:
    assert counts.switch_macs(SwitchConfig(experts=64)) - counts.switch_macs() == 256 * (64 - 8)
    small, large = counts.hmohe_count(CONFIG_A), counts.hmohe_count(counts.with_experts(CONFIG_A, 64))
    assert large.reads == small.reads
    assert large.macs - small.macs == 64 * (64 - 8)


def test_config_a() -> None:
    assert counts.hmohe_count(CONFIG_A) == counts.FieldCount(13_952, (16 + 8) * 8)
    assert counts.gate_count(CONFIG_A) == counts.FieldCount(1_536, 64)
    assert counts.proposal_count(0) == counts.FieldCount(176, 40)
    ray = counts.hmohe_ray()
    assert 2 * ray.macs == 2 * (48 * 13_952 + 352 * 176) == 1_463_296
    assert ray.reads == 23_296
    assert counts.hmohe_parameters() == {
        "experts": 102_318_944, "gate": 1_528_656, "proposals": 766_528 + 860_160, "mlps": 35_808, "total": 105_510_096,
    }  # fmt: skip


def test_flop_ratio_is_no_speed_up() -> None:
    ratio = counts.switch_ray_flops(False) / (2 * counts.hmohe_ray().macs)
    assert ratio == pytest.approx(755, abs=1)


def test_parameters_grow_linearly_with_experts() -> None:
    def tables(experts: int) -> int:
        config = replace(CONFIG_A, experts=(CONFIG_A.experts[0],) * experts)
        return counts.hmohe_parameters(config)["experts"]

    assert tables(16) == 2 * tables(8) == 16 * 12_196_240


def test_a_trace_that_is_no_whole_number_of_reads_is_an_error() -> None:
    table = torch.nn.Embedding(10, 3, device="meta")
    with pytest.raises(ArithmeticError, match="whole number"):
        counts.count(counts.trace(table, torch.empty(7, device="meta", dtype=torch.int64)), 7)
