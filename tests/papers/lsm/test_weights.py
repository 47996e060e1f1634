"""Generators of random conductances: moments in closed form, the forming law, the grid."""

from __future__ import annotations

import math

import pytest
import torch

from papers.lsm import weights
from papers.lsm.weights import Weights, breakdown, formed_fraction, forming_voltage, gaussian, weight_sd
from shared.errors import UserError


@pytest.mark.parametrize(("formed", "sd"), [(0.85, 6.598), (1.0, 2.46), (0.5, 8.85)])
def test_spread_of_a_differential_weight(formed: float, sd: float) -> None:
    assert weight_sd(formed) == pytest.approx(sd, abs=0.005)


def test_spread_of_a_single_cell() -> None:
    assert weight_sd(0.5, differential=False) == pytest.approx(6.257, abs=0.0005)
    assert weight_sd(0.5, differential=False) == pytest.approx(6.352, rel=0.0151)


@pytest.mark.parametrize("formed", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("differential", [True, False])
def test_drawn_weights_have_the_moments(formed: float, differential: bool) -> None:
    w = breakdown(600, 300, 1, formed=formed, differential=differential)
    values = w.stacked().double()
    expected = weight_sd(formed, differential=differential)
    n = values.numel()
    assert abs(float(values.mean())) < 5 * expected / math.sqrt(n) + 1 / 64
    assert float(values.std()) == pytest.approx(expected, rel=0.01, abs=1e-9)
    # The squared cells: E[sum G²] is q (mu² + sigma²) for each cell.
    cells = 2 if differential else 1
    assert float(w.input_power.double().mean()) == pytest.approx(
        cells * formed * (12.27**2 + 1.74**2), rel=0.01, abs=1e-9
    )


def test_the_gaussian_generator_has_the_code_s_statistics() -> None:
    w = gaussian(2000, 400, 0)
    assert float(w.input.double().std()) == pytest.approx(6.61329, rel=0.005)
    assert float(w.recurrent.double().std()) == pytest.approx(6.67268, rel=0.01)
    assert abs(float(w.input.double().mean()) - 0.00156) < 5 * 6.6 / math.sqrt(w.input.numel())


def test_forming_law() -> None:
    assert formed_fraction(3.433) == 0.5
    assert formed_fraction(100.0) == 1.0
    assert formed_fraction(3.433 + 0.114) == pytest.approx(0.8413447, abs=1e-6)
    assert forming_voltage(0.85) == pytest.approx(3.551, abs=0.0005)
    assert formed_fraction(forming_voltage(0.3)) == pytest.approx(0.3)


def test_weights_lie_on_the_grid_and_repeat_with_the_seed() -> None:
    for make in (gaussian, breakdown):
        a, b, c = make(50, 60, 3), make(50, 60, 3), make(50, 60, 4)
        assert torch.equal(a.stacked(), b.stacked())
        assert not torch.equal(a.stacked(), c.stacked())
        a.check_exact()
        assert float(a.stacked().abs().max()) <= 32.0


def test_inexact_weights_are_refused() -> None:
    off = Weights(torch.tensor([[0.01]]), torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1))
    with pytest.raises(UserError, match="1/64"):
        off.check_exact()
    heavy = torch.full((20000, 1), 32.0)
    with pytest.raises(UserError, match=r"2\*\*24"):
        Weights(heavy, torch.zeros(1, 1), heavy, torch.zeros(1, 1)).check_exact()
    with pytest.raises(UserError, match="between 0 and 1"):
        breakdown(2, 2, 0, formed=1.5)
    assert weights.MAX_STEPS == 16_777_216
