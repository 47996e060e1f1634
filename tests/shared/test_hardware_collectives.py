"""Collectives: closed forms, identities between them, and the published all-reduce fits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import UserError
from shared.hardware import AlphaBeta, load_device

sizes, ranks = st.floats(1, 1e11), st.integers(1, 64)


def test_closed_forms_of_a_ring() -> None:
    link = AlphaBeta(1e11, 1e-5, "step")  # 8e8 B on 4 ranks: a quarter is 2e8 B = 2 ms
    assert link.reduce_scatter_s(8e8, 4) == pytest.approx(3 * (1e-5 + 2e-3))
    assert link.all_gather_s(8e8, 4) == pytest.approx(3 * (1e-5 + 2e-3))
    assert link.all_reduce_s(8e8, 4) == pytest.approx(6 * (1e-5 + 2e-3))
    assert link.all_to_all_s(8e8, 4) == pytest.approx(3 * (1e-5 + 2e-3))
    assert link.broadcast_s(8e8, 4) == pytest.approx(3e-5 + 8e-3)
    assert link.point_to_point_s(8e8) == pytest.approx(1e-5 + 8e-3)


def test_alpha_of_a_call_is_paid_once() -> None:
    link = AlphaBeta(1e11, 1e-5, "call")
    assert link.all_reduce_s(8e8, 4) == pytest.approx(1e-5 + 12e-3)
    assert link.all_gather_s(8e8, 4) == pytest.approx(1e-5 + 6e-3)


@given(sizes, ranks, st.sampled_from(["call", "step"]))
def test_identities(size: float, n: int, per: str) -> None:
    link = AlphaBeta(2e10, 3e-6, per)  # type: ignore[arg-type]
    if per == "step":
        parts = link.reduce_scatter_s(size, n) + link.all_gather_s(size, n)
        assert link.all_reduce_s(size, n) == pytest.approx(float(parts))
    assert link.all_reduce_s(size, n + 1) >= link.all_reduce_s(size, n) * (1 - 1e-12)
    assert link.all_reduce_s(2 * size, n) >= link.all_reduce_s(size, n)
    for operation in (link.all_reduce_s, link.all_gather_s, link.reduce_scatter_s, link.all_to_all_s, link.broadcast_s):
        assert operation(size, 1) == 0  # one rank has nothing to send
    if n > 1:
        moved = 2 * (n - 1) / n * size
        bus = moved / (link.all_reduce_s(size, n) - link.all_reduce_s(0.0, n))
        assert bus == pytest.approx(2e10)  # what measurements call bus bandwidth


def test_vectorised_over_sizes_and_ranks() -> None:
    times = AlphaBeta(1e11, 1e-5).all_reduce_s(np.array([1e6, 1e9])[:, None], np.array([2, 4, 8]))
    assert times.shape == (2, 3)
    assert times[1, 2] == pytest.approx(1e-5 + 2 * 7 / 8 * 1e-2)


def test_published_fits() -> None:
    a100, h100 = load_device("a100_sxm4_80gb"), load_device("h100_sxm5_80gb")
    gigabyte = 1e9
    assert AlphaBeta.of(a100, "nvlink_pair").all_reduce_s(gigabyte, 2) == pytest.approx(28.7e-6 + 1e9 / 1.89e11)
    for n, bus in ((2, 2.82e11), (4, 3.80e11), (8, 3.39e11)):
        fit = AlphaBeta.of(h100, f"nvlink_{n}")
        assert 17e-6 <= fit.alpha_s <= 31e-6
        assert fit.all_reduce_s(gigabyte, n) == pytest.approx(fit.alpha_s + 2 * (n - 1) / n * 1e9 / bus)
        assert h100.collective[f"nvlink_{n}"].ranks.value == n
        assert fit.bandwidth_bytes_per_s < h100.link_bytes_per_s("nvlink")
    four = AlphaBeta.of(a100, "four_ranks_without_full_nvlink", alpha_s=28.7e-6)
    assert AlphaBeta.of(a100, "nvlink_pair").bandwidth_bytes_per_s / four.bandwidth_bytes_per_s == pytest.approx(
        7.9, abs=0.1
    )


def test_what_has_no_fit_is_an_error() -> None:
    a100 = load_device("a100_sxm4_80gb")
    with pytest.raises(
        UserError, match="unknown collective topology of device 'a100_sxm4_80gb' 'nvlink': did you mean"
    ):
        AlphaBeta.of(a100, "nvlink")
    with pytest.raises(UserError, match="no alpha for topology network_16: give alpha_s"):
        AlphaBeta.of(a100, "network_16")
    with pytest.raises(ValueError, match="whole numbers of at least 1"):
        AlphaBeta(1e9, 0.0).all_reduce_s(1e6, 0)
    with pytest.raises(ValueError, match="positive bandwidth"):
        AlphaBeta(0.0, 0.0)
    with pytest.raises(ValueError, match="negative"):
        AlphaBeta(1e9, 0.0).point_to_point_s(-1.0)
    with pytest.raises(ValueError, match="call or step"):
        AlphaBeta(1e9, 0.0, "ring")  # type: ignore[arg-type]
