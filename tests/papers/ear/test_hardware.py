"""Counts at full size to the last digit, and the board model in closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.ear.adaptors import Architecture
from papers.ear.counts import adaptor_work, encoder_counts, mahalanobis_entries, projection_entries, projection_work
from papers.ear.hardware import (
    FORMS,
    EventEnergy,
    encoder_part,
    growth,
    padded_dim,
    plan_board,
    projection_part,
    search_macs,
    similarity_part,
    training_share,
)
from shared.errors import UserError
from shared.hardware import load_device

NANO = load_device("jetson_nano")


@pytest.mark.parametrize(
    ("name", "params", "headless", "macs", "width", "share"),
    [
        ("resnet18", 11_689_512, 11_176_512, 1_814_073_344, 960, 0.529),
        ("resnet50", 25_557_032, 23_508_032, 4_089_184_256, 3840, 0.939),
        ("mobilenetv2_100", 3_504_872, 2_223_872, 300_774_272, 488, 1.622),
        ("efficientnet_b0", 5_288_548, 4_007_548, 385_814_752, 512, 1.327),
        ("deit_tiny_patch16_224", 5_717_416, 5_524_416, 1_253_683_200, 576, 0.459),
    ],
)
def test_encoder_counts(name: str, params: int, headless: int, macs: int, width: int, share: float) -> None:
    c = encoder_counts(name)
    assert (c.params, c.headless_params, c.macs, sum(c.channels)) == (params, headless, macs, width)
    assert 100 * projection_entries(c.channels, 10_000) / c.macs == pytest.approx(share, abs=5e-4)
    assert projection_work(c, 10_000).macs == 10_000 * width


def test_adaptor_of_resnet50() -> None:
    c = encoder_counts("resnet50")
    architecture = Architecture.uniform("lin", 4, 1 / 16)
    work = adaptor_work(architecture, c)
    assert (work.num_parameters, work.macs) == (712_160, 34_119_680)
    assert adaptor_work(architecture, c, side=None).macs == 4 * 25_690_112
    assert mahalanobis_entries(c.channels) == 5_570_560
    assert mahalanobis_entries(encoder_counts("mobilenetv2_100").channels) == 113_472


@pytest.mark.parametrize(
    ("board", "name", "encoder_ms", "hdc_ms"),
    [
        ("jetson_nano", "resnet50", 34.66, 6.00),
        ("jetson_nano", "mobilenetv2_100", 2.55, 0.76),
        ("jetson_orin_nano_super_8gb", "resnet50", 3.92, 1.51),
        ("jetson_orin_nano_super_8gb", "mobilenetv2_100", 0.29, 0.19),
        ("raspberry_pi_4b", "resnet50", 170.4, 12.0),
        ("raspberry_pi_4b", "mobilenetv2_100", 12.53, 1.53),
    ],
)
def test_latency_bounds(board: str, name: str, encoder_ms: float, hdc_ms: float) -> None:
    c, device = encoder_counts(name), load_device(board)
    assert 1e3 * encoder_part(c).bound_s(device) == pytest.approx(encoder_ms, rel=0.01)
    dense = projection_part(c, 10_000)
    assert 1e3 * dense.bound_s(device) == pytest.approx(hdc_ms, rel=0.01)
    assert dense.bound_by(device) == "memory"
    assert dense.ops / dense.bytes == pytest.approx(0.5, rel=0.01)


def test_remedies_on_the_nano() -> None:
    c = encoder_counts("resnet50")
    binary = projection_part(c, 10_000, "binary")
    assert 1e3 * binary.bound_s(NANO) == pytest.approx(0.33, abs=0.005)
    assert binary.bound_by(NANO) == "compute"
    assert padded_dim(10_000, 2048) == 16_384
    assert projection_part(c, 10_000, "hadamard").ops == 2 * 4 * 229_376
    seconds = {form: projection_part(c, 10_000, form).bound_s(NANO) for form in FORMS}
    assert seconds["hadamard"] < seconds["binary"] < seconds["dense"]
    assert seconds["seeded"] == pytest.approx(seconds["binary"] * 33 / 32, rel=1e-6)
    with pytest.raises(UserError, match="unknown projection form"):
        projection_part(c, 10_000, "ternary")  # type: ignore[arg-type]


@given(st.integers(1, 256))
@settings(max_examples=20, deadline=None)
def test_batching_amortises_the_matrix_and_never_costs_less_in_all(batch: int) -> None:
    c = encoder_counts("resnet50")
    one, many = projection_part(c, 10_000), projection_part(c, 10_000, batch=batch)
    assert many.bound_s(NANO) / batch <= one.bound_s(NANO) + 1e-12
    assert many.bound_s(NANO) >= one.bound_s(NANO) - 1e-12


def test_similarity_is_a_product_with_all_exemplars() -> None:
    dense = similarity_part(4, 65, 10_000)
    assert dense.ops == 2 * 2_600_000
    packed = similarity_part(4, 65, 10_000, binary=True)
    assert packed.bytes == pytest.approx(2_600_000 / 8 + 1250)
    assert dense.bound_s(NANO) / packed.bound_s(NANO) > 25


def test_training_share_and_search() -> None:
    f, a = 4_089_184_256, 34_119_680 + 38_400_000 + 650_000
    assert 100 * training_share(f, a, 10) == pytest.approx(5.12, abs=0.005)
    assert 1 / training_share(f, a, 10) == pytest.approx(19.5, abs=0.05)
    assert training_share(f, a, 10, cached=False) == pytest.approx(1 / 3 + a / f)
    assert training_share(f, f, 10, cached=False) > 1  # an adaptor as large as the encoder saves nothing
    assert search_macs(10.0, 1.0, candidates=2, batch=4, samples=3) == 40 + 2 * (24 + 9)


def test_energy_counts_events() -> None:
    events = EventEnergy(mac_j=4.6e-12, dram_word_j=6.4e-10, binary_step_j=3e-15)
    assert events.inference_j(1e9, 4e6, 1e9) == pytest.approx(4.6e-3 + 6.4e-4 + 3e-6)


def test_growth_of_memory_and_how_many_domains_fit() -> None:
    c = encoder_counts("resnet50")
    g = growth(c, 712_160, 65, 10_000)
    assert g.projection_bytes == 153.6e6
    assert g.adaptor_bytes + g.head_bytes == 4 * (712_160 + 2 * 650_000)
    most = g.domains_that_fit(3.29e9)
    assert g.total_bytes(most) <= 3.29e9 < g.total_bytes(most + 1)
    assert g.domains_that_fit(1e8) == 0
    small = growth(c, 712_160, 65, 10_000, "binary", binary_head=True)
    assert small.projection_bytes == 4.8e6
    assert small.head_bytes == g.head_bytes / 32


def test_planner_answers_and_refuses() -> None:
    c = encoder_counts("resnet50")
    ask = {
        "adaptor_params": 712_160,
        "adaptor_macs": 34_119_680,
        "classes": 65,
        "dim": 10_000,
        "form": "dense",
        "binary_head": False,
    }
    plan = plan_board(NANO, c, reserve_bytes=1e9, **ask)  # type: ignore[arg-type]
    assert plan.domains == growth(c, 712_160, 65, 10_000).domains_that_fit(NANO.size_bytes() - 1e9)
    assert plan.latency_s == pytest.approx(34.66e-3 + 6.0e-3 + 0.41e-3 + 0.289e-3, rel=0.01)
    with pytest.raises(UserError, match="less than the reserve"):
        plan_board(NANO, c, reserve_bytes=1e10, **ask)  # type: ignore[arg-type]
    pi5 = load_device("raspberry_pi_5")
    with pytest.raises(UserError, match="raspberry_pi_5"):
        plan_board(pi5, c, reserve_bytes=1e9, **ask)  # type: ignore[arg-type]
    assert plan_board(pi5, c, reserve_bytes=1e9, memory_bytes=8e9, **ask).domains > plan.domains  # type: ignore[arg-type]
