"""Buffers, double-buffered loading and streamed weights, against closed forms and a step-by-step simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.hardware import Buffers, Hop, double_buffered_latency, streamed_latency, transfer_s

seconds = st.floats(0, 10)
steps = st.lists(seconds, min_size=1, max_size=8)


def test_buffers_count_words() -> None:
    d, tokens, experts, hidden = 384, 1201, 16, 384
    small = Buffers.of(
        16,
        attention=4 * d * d + 4 * d,
        patch_embedding=768 * d + d,
        layer_norms=4 * d,
        tokens=tokens * d,
        class_token=d,
        mlp=8 * d * d + 5 * d,
    )
    mib = {str(row["buffer"]): row["size_mib"] for row in small.rows()}
    assert mib["attention"] == pytest.approx(1.12793, abs=5e-6)
    assert mib["mlp"] == pytest.approx(2.25366, abs=5e-6)
    assert small.size_mib == pytest.approx(4.82813, abs=5e-6)
    routed = small.add("router", words=d * experts, bits=16)
    assert routed.size_mib == pytest.approx(4.83984, abs=5e-6)
    naive = routed.without("mlp").add("experts", words=experts * (2 * d * hidden + hidden + d), bits=16)
    assert naive.size_mib == pytest.approx(11.60962, abs=5e-6)
    assert small.fits(38 / 8 * 2**20) is False  # 38 Mbit = 4.75 MiB
    assert small.fits(small.size_bytes)


def test_buffers_of_mixed_widths() -> None:
    mixed = Buffers.of(16, weights=1024).add("scores", words=64, bits=32).add("flags", words=3, bits=1)
    assert mixed.size_bytes == 2048 + 256 + 3 / 8
    assert Buffers().size_bytes == 0
    with pytest.raises(ValueError, match="there already"):
        mixed.add("scores", words=1, bits=8)
    with pytest.raises(KeyError):
        mixed.without("score")
    with pytest.raises(ValueError, match="words >= 0"):
        Buffers.of(16, weights=-1)


def simulate(compute: list[float], load: list[float], exposed: bool) -> float:
    """Clockwork: one loader, one processor, two buffers; step i's data may load once step i-1 has begun to compute."""
    ready = load[0] if exposed else 0.0
    free = 0.0
    for i, busy in enumerate(compute):
        begin = max(ready, free)
        free = begin + busy
        ready = begin + load[i + 1] if i + 1 < len(load) else free
    return free


@given(st.lists(st.tuples(seconds, seconds), min_size=1, max_size=8), st.booleans())
def test_double_buffer_is_the_simulation(pairs: list[tuple[float, float]], exposed: bool) -> None:
    compute, load = [c for c, _ in pairs], [x for _, x in pairs]
    assert float(double_buffered_latency(compute, load, exposed)) == pytest.approx(simulate(compute, load, exposed))


@given(steps, seconds)
def test_double_buffer_limits(compute: list[float], load: float) -> None:
    time = float(double_buffered_latency(compute, load))
    m, total = len(compute), sum(compute)
    slack = 1e-9
    assert time >= max(total, (m - 1) * load + compute[-1]) - slack
    assert time <= total + (m - 1) * load + slack
    if all(c >= load for c in compute):
        assert time == pytest.approx(total)  # never waits
    if all(c < load for c in compute):
        assert time == pytest.approx((m - 1) * load + compute[-1])  # waits every time
    assert float(double_buffered_latency(compute, load, first_load_exposed=True)) == pytest.approx(time + load)


def test_double_buffer_by_hand() -> None:
    # max(3, 2) + max(1, 2) + 4; the last load is that of step 3
    assert double_buffered_latency([3.0, 1.0, 4.0], 2.0) == 9.0
    assert double_buffered_latency([3.0, 1.0, 4.0], [7.0, 5.0, 0.5]) == 5 + 1 + 4
    assert double_buffered_latency([3.0], 2.0) == 3.0
    assert double_buffered_latency(np.zeros((2, 0)), 1.0).tolist() == [0, 0]


@given(st.lists(st.tuples(seconds, seconds, st.booleans()), min_size=1, max_size=8), st.booleans())
def test_steps_that_are_not_valid_might_as_well_not_be_there(
    rows: list[tuple[float, float, bool]], exposed: bool
) -> None:
    compute, load, valid = (list(column) for column in zip(*rows, strict=True))
    kept = [(c, x) for c, x, v in rows if v]
    expected = float(double_buffered_latency([c for c, _ in kept], [x for _, x in kept], exposed)) if kept else 0.0
    assert float(double_buffered_latency(compute, load, exposed, valid=valid)) == pytest.approx(expected)


def test_double_buffer_is_vectorised_and_refuses_nonsense() -> None:
    rng = np.random.default_rng(1)
    compute, load = rng.random((5, 7, 6)), rng.random((7, 6))
    result = double_buffered_latency(compute, load)
    assert result.shape == (5, 7)
    assert result[3, 2] == pytest.approx(float(double_buffered_latency(compute[3, 2], load[2])))
    with pytest.raises(ValueError, match="negative"):
        double_buffered_latency([1.0, -1.0], 1.0)
    with pytest.raises(ValueError, match="axis of steps"):
        double_buffered_latency(1.0, 1.0)


def test_transfers_over_a_chain() -> None:
    flash, host = Hop(4e9, 1e-4), Hop(2e10, 1e-5)
    assert transfer_s(8e9, [flash, host]) == pytest.approx(2 + 1.1e-4)  # the slowest link sets the rate
    assert transfer_s(8e9, [flash, host], pipelined=False) == pytest.approx(2 + 0.4 + 1.1e-4)
    assert transfer_s([0.0, 4e9], [flash]).tolist() == [0.0, pytest.approx(1 + 1e-4)]
    for wrong in ({"bandwidth_bytes_per_s": 0.0}, {"bandwidth_bytes_per_s": 1.0, "latency_s": -1.0}):
        with pytest.raises(ValueError, match="a hop needs"):
            Hop(**wrong)
    with pytest.raises(ValueError, match="at least one hop"):
        transfer_s(1.0, [])
    with pytest.raises(ValueError, match="negative"):
        transfer_s(-1.0, [flash])


def test_streamed_weights_hide_behind_compute_or_set_the_pace() -> None:
    size, link = 1e8, [Hop(1e10)]  # 10 ms a layer
    slow, fast = np.full(8, 0.020), np.full(8, 0.002)
    assert streamed_latency(slow, size, link) == pytest.approx(0.010 + 8 * 0.020)
    assert streamed_latency(fast, size, link) == pytest.approx(8 * 0.010 + 0.002)
    assert streamed_latency(fast, size, link, overlap=False) == pytest.approx(8 * 0.012)
    assert streamed_latency(fast, size, link, overlap=False, first_load_exposed=False) == pytest.approx(
        8 * 0.012 - 0.010
    )
    assert streamed_latency(fast, size, link, resident=1.0) == pytest.approx(8 * 0.002)
    assert streamed_latency(fast, size, link, resident=0.9) == pytest.approx(0.001 + 8 * 0.002)  # 1 ms a layer
    first_resident = np.array([1.0] + [0.0] * 7)
    assert streamed_latency(fast, size, link, resident=first_resident) == pytest.approx(7 * 0.010 + 0.002)
    with pytest.raises(ValueError, match="fraction in"):
        streamed_latency(fast, size, link, resident=1.5)


@given(steps, st.floats(0, 1), st.booleans())
def test_overlap_and_residence_never_slow_down(compute: list[float], resident: float, pipelined: bool) -> None:
    hops = [Hop(1e9), Hop(2e9, 1e-3)]
    plain = float(streamed_latency(compute, 1e9, hops, overlap=False, pipelined=pipelined))
    overlapped = float(streamed_latency(compute, 1e9, hops, pipelined=pipelined))
    kept = float(streamed_latency(compute, 1e9, hops, resident=resident, pipelined=pipelined))
    assert sum(compute) - 1e-9 <= kept <= overlapped + 1e-9 <= plain + 2e-9
