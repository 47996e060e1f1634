"""The hardware model against arithmetic by hand, and the peer's encoding against ours."""

from __future__ import annotations

import pytest
import torch

from papers.switchnerf.hardware import (
    ADAM_BYTES,
    SECTOR_BYTES,
    Assumed,
    Gather,
    gather_s,
    hmohe_memory_bytes,
    hmohe_ray,
    mlp_cost,
    peak_ratio,
    switch_ray,
)
from papers.switchnerf.hashgrid import GridSpec, HashEncoding
from papers.switchnerf.hmohe import CONFIG_A
from papers.switchnerf.peers import nerfstudio_encode, scalings
from shared.errors import UserError
from shared.hardware import load_device

ASSUMED = Assumed(compute=0.5, bandwidth=0.8, overhead_s=5e-6)
H200, RTX = load_device("h200_sxm_141gb"), load_device("rtx_3090")


def test_bare_roofline_ratios() -> None:
    # Products at the full peak against 23,296 sectors of 32 B per ray at the full bandwidth
    assert peak_ratio(RTX, "bfloat16", 1.5803e9, 23_296) == pytest.approx(28, abs=0.5)
    assert peak_ratio(H200, "bfloat16", 1.5803e9, 23_296) == pytest.approx(10.3, abs=0.2)


def test_reads_in_point_order_cross_dram() -> None:
    seconds, resident = gather_s(Gather(1e9, 2e6, 2e8), RTX, ASSUMED, "point")
    assert seconds == pytest.approx(1e9 * SECTOR_BYTES / (9.36e11 * 0.8))
    assert not resident


def test_reads_in_level_order_come_from_the_l2_while_a_level_fits() -> None:
    seconds, resident = gather_s(Gather(1e9, 2e6, 2e8), H200, ASSUMED, "level")
    assert seconds == pytest.approx(1e9 * SECTOR_BYTES / 1.19e13)
    assert resident
    _, resident = gather_s(Gather(1e9, 5e7, 2e8), H200, ASSUMED, "level")
    assert not resident
    with pytest.raises(UserError, match="no bandwidth for memory level l2"):
        gather_s(Gather(1e9, 2e6, 2e8), RTX, ASSUMED, "level")


def test_flops_of_a_ray() -> None:
    cost = switch_ray(RTX, "bfloat16", ASSUMED, training=False, with_background=True)
    assert cost.flops == pytest.approx(1.5803e9, rel=1e-4)
    ours = hmohe_ray(CONFIG_A, RTX, "bfloat16", ASSUMED, training=False, rays=4096, order="point")
    assert ours.flops == pytest.approx(1_463_296)
    assert ours.rays_per_s > cost.rays_per_s


def test_saved_activations_bracket_the_published_memory() -> None:
    saved = [
        1024 * switch_ray(RTX, "bfloat16", ASSUMED, training=True, with_background=b).saved_bytes / 1e9
        for b in (False, True)
    ]
    assert saved[0] < 9.9 < saved[1]


def test_training_is_dearer_and_has_an_adam_pass() -> None:
    step = hmohe_ray(CONFIG_A, RTX, "bfloat16", ASSUMED, training=True, rays=8192, order="point")
    image = hmohe_ray(CONFIG_A, RTX, "bfloat16", ASSUMED, training=False, rays=8192, order="point")
    assert step.seconds > 2 * image.seconds
    assert step.parts_s["Adam"] * 8192 == pytest.approx(105_510_096 * ADAM_BYTES / (9.36e11 * 0.8))
    assert mlp_cost("mega", RTX, "bfloat16", ASSUMED, False).flops == pytest.approx(2 * 605_696)


def test_memory_of_config_a() -> None:
    assert hmohe_memory_bytes(CONFIG_A, False) == {"half-precision weights": 2 * 105_510_096}
    assert sum(hmohe_memory_bytes(CONFIG_A, True).values()) == 18 * 105_510_096


def test_nerfstudios_algorithm_equals_the_torch_convention() -> None:
    spec = GridSpec(4, 4, 50, 10, convention="torch")
    encoding = HashEncoding([spec], "reference")
    x = torch.rand(300, 3)
    peer = nerfstudio_encode(x, encoding.table, scalings(spec, "cpu"), 10)
    torch.testing.assert_close(peer, encoding(x), atol=1e-7, rtol=1e-4)
