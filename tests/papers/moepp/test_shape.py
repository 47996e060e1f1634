"""Exact counts of the four configurations."""

from __future__ import annotations

import pytest

from papers.moepp.layer import MoEPlusPlus
from papers.moepp.shape import (
    SHAPES,
    TAUS,
    activated_parameters,
    expert_flops_per_token,
    expert_parameters,
    parameters,
    shape,
    zero_computation_flops_per_token,
)
from shared.errors import UserError


@pytest.mark.parametrize(
    ("name", "vanilla", "plus", "zero_computation", "routing", "experts"),
    [
        ("0.6B", 582_052_608, 582_146_352, 55_296, 112_176, 452_984_832),
        ("1B", 1_035_111_168, 1_035_207_728, 55_296, 188_720, 905_969_664),
        ("7B", 7_676_241_408, 7_676_619_248, 221_184, 746_480, 7_247_757_312),
    ],
)
def test_parameters(name: str, vanilla: int, plus: int, zero_computation: int, routing: int, experts: int) -> None:
    s = shape(name)
    p = parameters(s)
    assert p.total == plus
    assert p.zero_computation == zero_computation
    assert p.router + p.pathway == routing
    assert p.ffn_experts == experts
    assert parameters(s.vanilla()).total == vanilla


def test_one_expert() -> None:
    assert [expert_parameters(shape(n)) for n in ("0.6B", "7B")] == [4_718_592, 18_874_368]


def test_activated_parameters() -> None:
    assert activated_parameters(shape("0.6B")) == 191_982_336
    assert activated_parameters(shape("1B")) == 192_056_064
    assert activated_parameters(shape("7B")) == 1_233_790_464
    assert activated_parameters(shape("7B"), 2) == pytest.approx(1.334e9, rel=1e-3)


def test_flops() -> None:
    assert {expert_flops_per_token(SHAPES[n]) for n in ("0.6B", "1B", "2B")} == {226_492_416.0}
    assert expert_flops_per_token(SHAPES["7B"]) == 1_811_939_328.0
    assert expert_flops_per_token(SHAPES["1B"], 0.25) == 113_246_208.0
    assert zero_computation_flops_per_token(SHAPES["1B"]) == 10_752.0
    share = zero_computation_flops_per_token(SHAPES["1B"]) / (6 * 768 * 2048)
    assert share == pytest.approx(0.0011, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "shares"),
    [("0.6B", (1 / 6, 1 / 3, 0.5, 0.6, 2 / 3)), ("1B", (2 / 7, 0.5, 2 / 3, 0.75, 0.8))],
)
def test_shares(name: str, shares: tuple[float, ...]) -> None:
    assert [SHAPES[name].rho(tau) for tau in TAUS] == pytest.approx(shares)


def test_a_built_layer_has_the_counted_parameters() -> None:
    s = SHAPES["0.6B"]
    layer = MoEPlusPlus(s.d_model // 16, s.d_expert // 16, 8)  # a sixteenth of each width: counts scale with d·h and d
    d, h = s.d_model // 16, s.d_expert // 16
    assert sum(p.numel() for p in layer.parameters()) == 3 * d * h * 8 + 3 * d * 2 + 12 * d + 12 * 12


def test_unknown_model() -> None:
    with pytest.raises(UserError, match=r"0\.6B"):
        shape("3B")
