"""The cost model against numbers worked by hand and the published table."""

from __future__ import annotations

import numpy as np
import pytest

from papers.moepp import hardware as hw
from papers.moepp.hardware import Assumed
from papers.moepp.shape import SHAPES, TAUS
from shared.errors import UserError
from shared.hardware import AlphaBeta, load_device

H200 = load_device("h200_sxm_141gb")
A100 = load_device("a100_sxm4_80gb")


class Fixed:
    """A device of 600 TFLOP/s and 4.3 TB/s that reaches both."""

    calibration = None

    def op_per_s(self, dtype: str) -> float:
        return 600e12

    def bandwidth_bytes_per_s(self) -> float:
        return 4.3e12


IDEAL = Assumed(fused=False, launches=0, compute_fraction=1.0, bandwidth_fraction=1.0)


def test_worked_layer() -> None:
    """1B, T = 65,536, no launches: GEMM 2.06, pointwise 0.52, weights 0.04, combine 0.05, in all 2.66 ms."""
    cost = hw.layer_cost(SHAPES["1B"], 1.0, 65_536, Fixed(), IDEAL)  # type: ignore[arg-type]
    parts = [cost.gemm_s, cost.pointwise_s, cost.weights_s, cost.combine_s]
    assert [round(1e3 * float(part[0]), 2) for part in parts] == [2.06, 0.52, 0.04, 0.05]
    assert 1e3 * float(cost.total_s[0]) == pytest.approx(2.66, abs=0.01)


@pytest.mark.parametrize(
    ("name", "tau", "value"),
    [("1B", 0.1, 3.25), ("1B", 0.75, 1.32), ("1B", 1.0, 1.24), ("0.6B", 0.75, 1.64), ("7B", 0.75, 1.32)],
)
def test_worked_speedups(name: str, tau: float, value: float) -> None:
    assert float(hw.speedup(SHAPES[name], [tau], 65_536, Fixed(), IDEAL)[0]) == pytest.approx(value, abs=0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("device", [A100, H200])
def test_speedup_is_monotone_and_below_its_bound(name: str, device: hw.Device) -> None:
    s = SHAPES[name]
    gains = hw.speedup(s, TAUS, 65_536, device, Assumed())
    assert bool((np.diff(gains) < 0).all())
    assert all(1 < g < 1 / s.rho(tau) for g, tau in zip(gains, TAUS, strict=True))
    small = hw.speedup(s, TAUS, 256, device, Assumed())
    assert bool((small < gains).all())  # launches and weights do not shrink with rho


def test_affine_law_of_the_published_table() -> None:
    """The five MoE++ rows of 1B: a = 154.8, b = 466.4 ms; the MoE row was not used and comes out 1.7 % high."""
    rho = [SHAPES["1B"].rho(tau) for tau in TAUS]
    times = [289.3, 384.9, 469.7, 500.3, 530.2]
    a, b = hw.affine_law(rho, times)
    assert (a, b) == (pytest.approx(154.8, abs=0.1), pytest.approx(466.4, abs=0.1))
    assert max(abs(a + b * r - t) for r, t in zip(rho, times, strict=True)) == pytest.approx(4.3, abs=0.1)
    assert a + b == pytest.approx(621.2, abs=0.2)
    a, b = hw.affine_law([SHAPES["0.6B"].rho(tau) for tau in TAUS], [202.4, 277.8, 387.3, 427.6, 449.6])
    assert (a, b, a + b) == (pytest.approx(115.6, abs=0.1), pytest.approx(514.8, abs=0.1), pytest.approx(630, abs=1))


def test_all_to_all_bytes() -> None:
    """1B, P = 2, T = 65,536: 100.7 MB vanilla, 75.5 MB at tau .75; 7B, P = 8, T = 8192: 44.0 and 33.0 MB."""
    mb = lambda name, rho, t, p: float(hw.all_to_all_bytes(SHAPES[name], rho, t, p)) / 1e6  # noqa: E731
    assert mb("1B", 1.0, 65_536, 2) == pytest.approx(100.7, abs=0.05)
    assert mb("1B", 0.75, 65_536, 2) == pytest.approx(75.5, abs=0.05)
    assert mb("7B", 1.0, 8192, 8) == pytest.approx(44.0, abs=0.05)
    assert mb("7B", 0.75, 8192, 8) == pytest.approx(33.0, abs=0.05)


def test_expert_parallel_exchange() -> None:
    """80 % of 450 GB/s: 280 and 210 µs each way; the mix hides under the dispatch."""
    link = AlphaBeta(0.8 * 450e9, 0.0)
    s = SHAPES["1B"]
    free = AlphaBeta(1e30, 0.0)
    for rho, us in ((1.0, 280), (0.75, 210)):
        with_link = hw.expert_parallel_s(s, rho, 65_536, 2, H200, link, Assumed())
        without = hw.expert_parallel_s(s, rho, 65_536, 2, H200, free, Assumed())
        combine = hw.layer_cost(s, rho, 65_536, H200, Assumed()).combine_s
        assert float((with_link - without + combine)[0]) * 1e6 == pytest.approx(2 * us, rel=0.01)


def test_energy_falls_with_rho_and_needs_figures() -> None:
    e = hw.energy_j_per_token(SHAPES["7B"], [0.75, 1.0], 65_536, A100, Assumed())
    assert float(e[1]) == pytest.approx(1.811939328e9 * 400 / 312e12, rel=0.1)  # compute dominates
    assert 0.75 < float(e[0] / e[1]) < 0.8
    with pytest.raises(UserError, match="bfloat16"):
        hw.energy_j_per_token(SHAPES["7B"], [1.0], 65_536, load_device("l40"), Assumed())


@pytest.mark.parametrize(
    ("name", "tau", "value"),
    [("0.6B", 0.1, 0.1835), ("1B", 0.1, 0.3060), ("0.6B", 0.75, 0.6036), ("1B", 0.75, 0.7516), ("1B", 1.0, 0.8)],
)
def test_sampling_biases_the_share(name: str, tau: float, value: float) -> None:
    assert hw.sampled_share(SHAPES[name], tau) == pytest.approx(value, abs=1e-4)
