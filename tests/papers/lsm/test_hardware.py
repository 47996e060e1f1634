"""Counts and ratios against integers and closed forms worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from papers.lsm.counts import (
    MACRO_CELLS,
    NMNIST,
    NTIDIGITS,
    TASKS,
    Encoder,
    activation_memory_ratio,
    task,
    training_cost_ratio,
)
from papers.lsm.gpu import step_loop
from papers.lsm.hardware import (
    Macro,
    digital_mac_j,
    energy_ratio,
    map_encoder,
    mean_neuron_step_j,
    multiplexed_sample_s,
    solve_kappa,
)
from papers.lsm.weights import gaussian
from papers.lsm.zeroshot import Heads
from shared.errors import UserError
from shared.hardware import load_device
from shared.workload import trace

MACRO = Macro(
    adc_j=1.67e-12, sample_hold_j=0.0, driver_j=4.17e-13, read_v=0.2, read_s=50e-9, conductance_s=12.3e-6,
    drive_s=5e-9, conversion_s=10e-9, neuron_s=5e-9, adcs=64,
)  # fmt: skip


def test_macs_heads_and_conversions() -> None:
    assert TASKS["nmnist"].encoder_macs == 4_560_000
    assert TASKS["ntidigits"].encoder_macs == 6_811_200
    assert TASKS["atv"].encoder_macs == 11_371_200
    assert [e.macs for e in TASKS["btv"].encoders] == [922_091_520, 284_196_864]
    assert TASKS["btv"].encoder_macs == 1_206_288_384
    assert [TASKS[t].head_macs for t in ("nmnist", "ntidigits", "atv", "btv")] == [2_000, 2_200, 25_600, 1_048_576]
    assert [TASKS[t].head_parameters for t in ("nmnist", "ntidigits", "atv", "btv")] == [
        2_010,
        2_211,
        25_728,
        1_049_088,
    ]
    assert [TASKS[t].conversions for t in ("nmnist", "ntidigits", "atv", "btv")] == [10_000, 25_800, 35_800, 512_000]
    assert [TASKS[t].random_weights for t in ("nmnist", "ntidigits", "btv")] == [91_200, 52_800, 10_387_456]


def test_cells_and_macros() -> None:
    assert [TASKS[t].cells for t in ("nmnist", "ntidigits", "atv", "btv")] == [182_400, 105_600, 288_000, 20_774_912]
    assert [round(TASKS[t].macros, 2) for t in ("nmnist", "ntidigits", "atv", "btv")] == [0.70, 0.40, 1.10, 79.25]
    assert MACRO_CELLS == 256 * 1024
    assert NMNIST.fits_array()
    assert NTIDIGITS.fits_array()
    assert not TASKS["btv"].encoders[0].fits_array()
    assert Encoder(312, 200, 1).fits_array()
    assert not Encoder(313, 200, 1).fits_array()  # a row too many
    assert not Encoder(10, 257, 1).fits_array()  # a neuron too many


class _Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        w = gaussian(256, 200, 0)
        self.w_in, self.w_rec = nn.Parameter(w.input), nn.Parameter(w.recurrent)

    def forward(self, x: Tensor) -> Tensor:
        return step_loop(x, self.w_in, self.w_rec, 0.9, 70.0)


def test_the_traced_loop_has_the_counted_macs() -> None:
    assert trace(_Loop(), torch.zeros(1, 50, 256)).macs == NMNIST.macs


def test_parameters_of_the_modules_are_the_counted_ones() -> None:
    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert size(nn.Linear(200, 10)) == 2_010
    assert size(nn.Linear(200, 11)) == 2_211
    assert size(Heads(200, 200, 64)) == 25_728
    assert size(Heads(2048, 2048, 256)) == 1_049_088
    assert gaussian(64, 200, 0).stacked().numel() == 52_800


def test_event_macs() -> None:
    assert NMNIST.event_macs(1.0, 1.0) == NMNIST.macs
    assert NMNIST.event_macs(0.08, 0.05) == pytest.approx(200 * 50 * (20.48 + 10))
    assert TASKS["atv"].event_macs((0.08, 0.19), 0.05) == pytest.approx(304_800 + 571_728)


def test_training_cost_rules() -> None:
    atv, btv = task("atv"), task("btv")
    assert training_cost_ratio(atv, "A") == pytest.approx(445.19, abs=0.005)
    assert training_cost_ratio(btv, "A") == pytest.approx(1151.41, abs=0.005)
    assert training_cost_ratio(atv, "B") == pytest.approx(6.60, abs=0.005)
    assert training_cost_ratio(atv, "C") == pytest.approx(148.06, abs=0.005)
    assert training_cost_ratio(btv, "C") == pytest.approx(383.47, abs=0.005)
    assert training_cost_ratio(atv, "D") == pytest.approx(2.99, abs=0.005)
    assert training_cost_ratio(btv, "D") == pytest.approx(3_622_010_880 / 1_209_434_112)
    assert training_cost_ratio(atv, "C", frozen=False) == 1.0
    with pytest.raises(UserError, match="training rule"):
        training_cost_ratio(atv, "E")
    assert (activation_memory_ratio(NMNIST), activation_memory_ratio(NTIDIGITS)) == (100, 258)


def test_energy_ratio_limits() -> None:
    atv = task("atv")
    assert energy_ratio(atv, 0.0) == pytest.approx(445.19, abs=0.005)
    assert energy_ratio(atv, 1e12) < 1e-6
    assert energy_ratio(atv, atv.encoder_macs / atv.conversions) == pytest.approx(1.0)
    assert atv.encoder_macs / atv.conversions == pytest.approx(317.6, abs=0.05)
    assert energy_ratio(atv, 1.0, per_weight=True) == pytest.approx(1.0)


def test_one_kappa_serves_both_published_ratios() -> None:
    atv, btv = task("atv"), task("btv")
    assert solve_kappa(atv, 23.34) == pytest.approx(12.92, abs=0.005)
    assert solve_kappa(btv, 160.0) == pytest.approx(12.69, abs=0.005)
    assert energy_ratio(atv, 12.8) == pytest.approx(23.55, abs=0.005)
    assert energy_ratio(btv, 12.8) == pytest.approx(158.8, abs=0.05)
    assert energy_ratio(atv, solve_kappa(atv, 30.0)) == pytest.approx(30.0)
    with pytest.raises(UserError, match="free conversions"):
        solve_kappa(atv, 500.0)


def test_event_driven_digital_hardware_nearly_closes_the_gap() -> None:
    atv = task("atv")
    assert energy_ratio(atv, 12.8, digital_macs=305_000 + 572_760) == pytest.approx(1.87, abs=0.005)


def test_energies_in_joules() -> None:
    mac = digital_mac_j(load_device("a100_pcie_80gb"))
    assert mac == pytest.approx(0.9615e-12, rel=1e-3)  # 2 x 300 W / 624e12 op/s
    assert MACRO.cell_read_j == pytest.approx(0.0246e-12, rel=1e-3)
    parts = MACRO.neuron_step_j(40, 200)
    assert parts["array"] == pytest.approx(1.968e-12, rel=1e-3)
    assert parts["ADC"] == pytest.approx(3.34e-12)
    assert parts["row drivers"] == pytest.approx(40 * 4.17e-13 / 200)
    both = mean_neuron_step_j(task("atv"), MACRO, (0.0, 0.0), 0.2)  # 40 active rows in either encoder
    assert both["array"] == pytest.approx(parts["array"])


def test_latency_and_mapping() -> None:
    assert MACRO.step_s(200) == pytest.approx(130e-9)
    assert MACRO.sample_s(NMNIST) == pytest.approx(6.5e-6)
    assert MACRO.sample_s(NTIDIGITS) == pytest.approx(16.77e-6)
    assert map_encoder(NMNIST).arrays == 1
    brain, image = task("btv").encoders
    assert (map_encoder(brain).row_blocks, map_encoder(brain).column_blocks) == (5, 8)  # 2,240 rows, 4,096 columns
    assert map_encoder(image).row_blocks == 6
    assert multiplexed_sample_s(MACRO, NMNIST) == pytest.approx(MACRO.sample_s(NMNIST))
    assert multiplexed_sample_s(MACRO, brain) == pytest.approx(201 * 40 * (5 + 50 + 8 * 10 + 5) * 1e-9)
    assert multiplexed_sample_s(MACRO, brain, arrays=40) == pytest.approx(201 * 140e-9)
