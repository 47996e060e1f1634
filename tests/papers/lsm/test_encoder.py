"""The encoder against closed forms, and its back ends against each other bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from papers.lsm.bits import pack, unpack
from papers.lsm.encoder import Liquid, firing_rate
from papers.lsm.weights import Weights, breakdown, gaussian
from shared.errors import UserError

CPU_BACKENDS = ("dense", "gather", "events")


def _single(current: float, *, decay: float, threshold: float, recurrent: float = 0.0) -> Liquid:
    """One neuron with one input of the given weight."""
    w_in, w_rec = torch.tensor([[current]]), torch.tensor([[recurrent]])
    return Liquid(Weights(w_in, w_rec, w_in.square(), w_rec.square()), decay, threshold)


def _always(steps: int) -> Tensor:
    return torch.ones(1, steps, 1)


def _spike_steps(liquid: Liquid, steps: int) -> list[int]:
    return (liquid.trace(_always(steps)).spikes[0, :, 0].nonzero()[:, 0] + 1).tolist()


def test_constant_input_fires_with_the_period_worked_by_hand() -> None:
    liquid = _single(0.6, decay=0.5, threshold=1.0)
    trace = liquid.trace(_always(9))
    torch.testing.assert_close(trace.potentials[0, :3, 0], torch.tensor([0.6, 0.9, 1.05]))
    assert _spike_steps(liquid, 9) == [3, 6, 9]
    for backend in CPU_BACKENDS:
        assert int(liquid.encode(_always(9), backend=backend)) == 3


def test_the_threshold_is_strict_and_the_reset_does_not_block_the_next_input() -> None:
    liquid = _single(1.0, decay=0.5, threshold=1.0)
    trace = liquid.trace(_always(4))
    assert _spike_steps(liquid, 4) == [2, 4]
    assert trace.potentials[0, :, 0].tolist() == [1.0, 1.5, 1.0, 1.5]  # step 3: reset to zero, then the whole input


@given(st.floats(0.05, 2.0), st.sampled_from([0.5, 0.75, 0.9, 0.95]))
@settings(max_examples=40, deadline=None)
def test_period_of_a_constant_current_follows_the_geometric_sum(current: float, decay: float) -> None:
    limit = current / (1 - decay)
    steps = 60
    first = next((n for n in range(1, steps + 1) if current * (1 - decay**n) / (1 - decay) > 1.0), None)
    gaps = [abs(current * (1 - decay**n) / (1 - decay) - 1.0) for n in range(1, steps + 1)]
    if min(gaps) < 1e-4:
        return  # too near the threshold for exact arithmetic to decide
    spikes = _spike_steps(_single(current, decay=decay, threshold=1.0), steps)
    assert (first is None) == (not spikes)
    if first is None:
        assert limit <= 1.0 or current * (1 - decay**steps) / (1 - decay) <= 1.0
    else:
        assert spikes == list(range(first, steps + 1, first))


def test_half_a_unit_of_current_is_silent_at_decay_09_and_threshold_5() -> None:
    assert _spike_steps(_single(0.4999, decay=0.9, threshold=5.0), 300) == []
    assert _spike_steps(_single(0.51, decay=0.9, threshold=5.0), 300) != []


def _random_spikes(batch: int, steps: int, inputs: int, density: float, seed: int) -> Tensor:
    return (torch.rand(batch, steps, inputs, generator=torch.Generator().manual_seed(seed)) < density).to(torch.uint8)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_scaling_const_and_threshold_by_a_power_of_two_changes_no_spike(backend: str) -> None:
    weights, spikes = gaussian(40, 50, 3), _random_spikes(8, 20, 40, 0.2, 4)
    a = Liquid.of(weights, decay=0.9, v_th=5.0, const=0.07).encode(spikes, backend=backend)
    b = Liquid.of(weights, decay=0.9, v_th=20.0, const=0.28).encode(spikes, backend=backend)
    assert int(a.sum()) > 0
    assert torch.equal(a, b)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_no_input_no_spike_and_no_time_no_count(backend: str) -> None:
    liquid = Liquid(gaussian(8, 12, 0), 0.9, 1.0)
    assert not liquid.encode(torch.zeros(3, 10, 8), backend=backend).any()
    assert liquid.encode(torch.ones(3, 0, 8), backend=backend).tolist() == [[0] * 12] * 3
    counts = liquid.encode(torch.ones(3, 10, 8), backend=backend)
    assert counts.min() >= 0
    assert 0 < counts.max() <= 10


def test_without_recurrence_neurons_are_independent() -> None:
    weights, spikes = gaussian(20, 10, 1).without_recurrence(), _random_spikes(4, 15, 20, 0.3, 2)
    together = Liquid(weights, 0.9, 20.0).encode(spikes)
    for n in range(10):
        column = Weights(
            weights.input[:, n : n + 1], torch.zeros(1, 1), weights.input_power[:, n : n + 1], torch.zeros(1, 1)
        )
        assert torch.equal(Liquid(column, 0.9, 20.0).encode(spikes)[:, 0], together[:, n])


def test_permuting_neurons_permutes_the_counts() -> None:
    w, spikes = gaussian(20, 30, 5), _random_spikes(6, 25, 20, 0.3, 6)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(7))
    moved = Weights(
        w.input[:, order], w.recurrent[order][:, order], w.input_power[:, order], w.recurrent_power[order][:, order]
    )
    counts = Liquid(w, 0.95, 40.0).encode(spikes)
    assert counts.sum() > 100
    assert torch.equal(Liquid(moved, 0.95, 40.0).encode(spikes), counts[:, order])


@pytest.mark.parametrize("make", [gaussian, breakdown])
@pytest.mark.parametrize(("inputs", "neurons", "steps"), [(256, 200, 50), (64, 200, 129), (33, 17, 21)])
def test_all_back_ends_agree_bit_for_bit(make: object, inputs: int, neurons: int, steps: int) -> None:
    weights = make(inputs, neurons, 11)  # type: ignore[operator]
    weights.check_exact()
    liquid = Liquid.of(weights, decay=0.97, v_th=5.3, const=0.08)
    spikes = _random_spikes(12, steps, inputs, 0.15, 12)
    oracle = liquid.encode(spikes, backend="dense")
    assert 0.005 < firing_rate(oracle, steps) < 0.9
    for backend in CPU_BACKENDS[1:]:
        assert torch.equal(liquid.encode(spikes, backend=backend), oracle), backend
    assert torch.equal(liquid.encode(spikes, backend="dense", block=5), oracle)


@pytest.mark.parametrize("inputs", [64, 50])
def test_packed_words_and_threads_change_no_count(inputs: int) -> None:
    liquid = Liquid.of(breakdown(inputs, 40, 3), decay=0.9, v_th=5.0, const=0.1)
    spikes = _random_spikes(37, 30, inputs, 0.2, 5)
    oracle = liquid.encode(spikes, backend="dense")
    assert int(oracle.sum()) > 0
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(liquid.encode(spikes), oracle)
            assert torch.equal(liquid.encode_words(pack(spikes)), oracle)
    finally:
        torch.set_num_threads(before)


def test_sums_of_the_largest_weights_do_not_overflow() -> None:
    # 64 inputs of 63.98 µS (4,095 grid steps) at once: 262,080 steps, eight times what 16 bits hold.
    pytest.importorskip("numba")
    w = Weights(torch.full((64, 3), 4095 / 64), torch.zeros(3, 3), torch.ones(64, 3), torch.zeros(3, 3))
    for threshold, fires in ((4094.9, True), (4095.1, False)):
        counts = Liquid(w, 0.5, threshold).encode(torch.ones(1, 1, 64), backend="events")
        assert counts.tolist() == [[int(fires)] * 3]


def test_added_rows_are_all_rows_when_everything_spikes() -> None:
    # Every input active and, from step 2 on, every neuron spiking: the event count is the dense one less the silent first step.
    w = Weights(torch.full((6, 4), 8.0), torch.zeros(4, 4), torch.ones(6, 4), torch.zeros(4, 4))
    counts, rows = Liquid(w, 0.5, 1.0).encode_counting(torch.ones(2, 9, 6))
    assert counts.tolist() == [[9] * 4] * 2
    assert rows.tolist() == [9 * 6 + 8 * 4] * 2


@pytest.mark.parametrize(("decay", "steps", "kept"), [(0.9, 50, 5.7e-3), (0.97, 129, 2.0e-2), (0.95, 201, 3.5e-5)])
def test_memory_decays_geometrically(decay: float, steps: int, kept: float) -> None:
    spikes = torch.zeros(1, steps, 1)
    spikes[0, 0] = 1
    last = float(_single(1.0, decay=decay, threshold=10.0).trace(spikes).potentials[0, -1, 0])
    assert last == pytest.approx(decay ** (steps - 1), rel=1e-4)
    assert last == pytest.approx(kept, rel=0.02)


def test_read_noise_of_zero_is_the_noiseless_path_and_noise_is_drawn_at_every_read() -> None:
    spikes = torch.ones(1, 400, 1)
    quiet = _single(2.0, decay=0.0, threshold=100.0)
    noisy = Liquid(quiet.weights, 0.0, 100.0, read_noise=0.1)
    values = noisy.trace(spikes, generator=torch.Generator().manual_seed(0)).potentials[0, :, 0]
    assert torch.equal(Liquid(quiet.weights, 0.0, 100.0, 0.0).trace(spikes).potentials, quiet.trace(spikes).potentials)
    assert float(values.mean()) == pytest.approx(2.0, abs=0.04)  # s.d. 0.2 over 20 independent square roots
    assert float(values.std()) == pytest.approx(0.2, rel=0.15)
    assert abs(float(torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1])) < 0.15


def test_read_noise_of_many_cells_adds_in_quadrature() -> None:
    w = Weights(torch.full((100, 1), 3.0), torch.zeros(1, 1), torch.full((100, 1), 9.0), torch.zeros(1, 1))
    spikes = torch.ones(1, 2000, 100)
    values = Liquid(w, 0.0, 1e6, 0.02).trace(spikes, generator=torch.Generator().manual_seed(1)).potentials
    assert float(values.std()) == pytest.approx(0.02 * 3.0 * math.sqrt(100), rel=0.08)


@given(st.integers(1, 100), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_packing_is_lossless(n: int, seed: int) -> None:
    spikes = _random_spikes(2, 3, n, 0.5, seed)
    words = pack(spikes)
    assert words.shape == (2, 3, -(-n // 32))
    assert torch.equal(unpack(words, n), spikes)


def test_packing_puts_input_0_into_the_lowest_bit() -> None:
    spikes = torch.zeros(1, 40, dtype=torch.uint8)
    spikes[0, [0, 5, 33]] = 1
    assert pack(spikes).tolist() == [[1 + 32, 2]]


def test_wrong_input_is_refused_with_a_sentence() -> None:
    liquid = Liquid(gaussian(4, 4, 0), 0.9, 1.0)
    with pytest.raises(UserError, match="did you mean 'dense'"):
        liquid.encode(torch.zeros(1, 1, 4), backend="dens")
    with pytest.raises(UserError, match=r"\(batch, steps, 4\)"):
        liquid.encode(torch.zeros(1, 1, 5))
    with pytest.raises(UserError, match="read noise"):
        Liquid(liquid.weights, 0.9, 1.0, 0.02).encode(torch.zeros(1, 1, 4), backend="events")
    with pytest.raises(UserError, match="const"):
        Liquid.of(liquid.weights, decay=0.9, v_th=1.0, const=0.0)
