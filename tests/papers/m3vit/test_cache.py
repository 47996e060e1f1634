"""Expert caches on routing traces against hand-worked traces and a cache that is simulated token by token."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from papers.m3vit import cache, hardware
from papers.m3vit.counts import ENCODERS, Encoder
from papers.m3vit.hardware import Accelerator
from shared.errors import UserError

SMALL = ENCODERS["small"]
ZCU104 = Accelerator(
    macs_per_s=1536 * 3e8,
    attention_macs_per_s=1536 * 3e8,
    clock_hz=3e8,
    bandwidth_bytes_per_s=1.92e10,
    power_w=10.0,
    weight_bits=16,
    router_drain_cycles=1,
)


def one_layer(*tokens: tuple[int, ...]) -> np.ndarray:
    return np.array(tokens)[None, None]


def traces(max_tokens: int = 12) -> st.SearchStrategy[tuple[np.ndarray, int]]:
    """A random routing of 2 layers and 2 images, and N."""

    def draw(seed: int, tokens: int, n: int, k: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng(seed)
        k = min(k, n)
        return cache.random_routing(rng, layers=2, images=2, tokens=tokens, num_experts=n, top_k=k), n

    return st.builds(draw, st.integers(0, 2**31), st.integers(1, max_tokens), st.integers(1, 9), st.integers(1, 4))


def step_by_step(tokens: np.ndarray, capacity: int) -> int:
    """An LRU cache that serves a token's experts together: least recently used first out, ties by index."""
    resident: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for token in tokens.tolist():
        wanted = sorted(token, reverse=True)  # the lowest index becomes the most recent
        misses += sum(expert not in resident for expert in wanted)
        for expert in wanted:
            resident.pop(expert, None)
            resident[expert] = None
        while len(resident) > capacity:
            resident.popitem(last=False)
    return misses


# --- misses ---


def test_hand_worked_traces() -> None:
    same = one_layer((0, 1), (1, 0), (0, 1))
    assert cache.previous_token_misses(same, 4).tolist() == [[2]]  # identical routing: K
    turning = one_layer((0, 1), (2, 3), (0, 1), (0, 2))
    assert cache.previous_token_misses(turning, 4).tolist() == [[2 + 2 + 2 + 1]]
    assert cache.lru_miss_curve(turning, 4).tolist() == [[[7, 5, 4]]]  # room for 2, 3, 4
    assert cache.compulsory_misses(turning, 4).tolist() == [[4]]
    assert cache.queue_lengths(turning, 4).tolist() == [[[3, 2, 2, 1]]]
    # expert 0 stays: 1 load; expert 1 is asked for 2 times, 2 twice, 3 once
    assert cache.pinned_misses(turning, 4, 1).tolist() == [[1 + 2 + 2 + 1]]
    assert cache.pinned_misses(turning, 4, 0).tolist() == [[8]]


def test_all_experts_resident_is_a_cold_start() -> None:
    trace = cache.random_routing(np.random.default_rng(1), layers=3, images=2, tokens=50, num_experts=4, top_k=4)
    assert np.all(cache.previous_token_misses(trace, 4) == 4)


def test_random_routing_converges_to_the_expectation() -> None:
    small = Encoder(num_experts=4, top_k=2)
    assert hardware.expected_misses(small, 3) == 4.0  # 2 + 2·2·(1 - 1/2)
    rng = np.random.default_rng(0)
    trace = cache.random_routing(rng, layers=1, images=20_000, tokens=3, num_experts=4, top_k=2)
    misses = cache.previous_token_misses(trace, 4)
    assert misses.mean() == pytest.approx(4.0, abs=5 * misses.std() / np.sqrt(misses.size))


def test_random_routing_reproduces_the_cache_design_of_tab_4() -> None:
    rng = np.random.default_rng(0)
    trace = cache.random_routing(rng, layers=6, images=16, tokens=1025, num_experts=16, top_k=4)
    frames = cache.previous_token_misses(trace, 16).sum(0)
    assert frames.mean() == pytest.approx(18_456, abs=5 * frames.std(ddof=1) / 4)
    assert frames.std(ddof=1) < 0.01 * 18_456  # a frame is large enough for its own expectation
    assert cache.miss_ratio(trace, 16) == pytest.approx(1.0, abs=0.005)


def test_random_routing_is_uniform() -> None:
    trace = cache.random_routing(np.random.default_rng(3), layers=2, images=50, tokens=200, num_experts=8, top_k=3)
    share = cache.queue_lengths(trace, 8).sum((0, 1)) / (2 * 50 * 200)
    assert share == pytest.approx(np.full(8, 3 / 8), abs=0.02)


def test_skewed_routing_is_imbalanced_but_does_not_stall_at_half_a_nat() -> None:
    """Zero-overhead switching survives moderate imbalance: the shortest queue still exceeds 49 tokens."""
    shape = {"layers": 6, "images": 10, "tokens": 1025, "num_experts": 16, "top_k": 4}
    even, skewed, steep = (
        cache.queue_lengths(cache.random_routing(np.random.default_rng(0), **shape, skew=skew), 16)
        for skew in (0.0, 0.5, 1.5)
    )
    means = [cache.imbalance(queues).mean() for queues in (even, skewed, steep)]
    assert means[0] < 1.2 < means[1] < means[2] <= 4.0
    stalls = [cache.stall_probability(queues, 48.125) for queues in (even, skewed, steep)]
    assert stalls[:2] == [0.0, 0.0]
    assert stalls[2] > 0.0
    totals = [
        hardware.frame_latency(SMALL, 1025, ZCU104, design="reordered", queues=np.moveaxis(queues, 0, 1)).total_s
        for queues in (even, skewed, steep)
    ]
    assert np.ptp(np.concatenate(totals[:2])) == 0.0
    assert np.all(totals[2] > totals[0])


@given(traces())
def test_lru_equals_the_step_by_step_cache(drawn: tuple[np.ndarray, int]) -> None:
    trace, n = drawn
    curve = cache.lru_miss_curve(trace, n)
    k = trace.shape[-1]
    for layer in range(2):
        for image in range(2):
            expected = [step_by_step(trace[layer, image], capacity) for capacity in range(k, n + 1)]
            assert curve[layer, image].tolist() == expected


@given(traces())
def test_cache_invariants(drawn: tuple[np.ndarray, int]) -> None:
    trace, n = drawn
    k, tokens = trace.shape[-1], trace.shape[2]
    curve = cache.lru_miss_curve(trace, n)
    assert np.all(np.diff(curve, axis=-1) <= 0)  # more room never hurts
    assert np.array_equal(curve[..., 0], cache.previous_token_misses(trace, n))
    assert np.array_equal(curve[..., -1], cache.compulsory_misses(trace, n))
    assert np.all(cache.queue_lengths(trace, n).sum(-1) == k * tokens)
    for capacity in range(n + 1):
        pinned = cache.pinned_misses(trace, n, capacity)
        assert np.all(pinned >= cache.compulsory_misses(trace, n))
        assert np.all(pinned <= k * tokens)
    assert np.array_equal(cache.lru_misses(trace, n, k), curve[..., 0])


# --- token orders ---


@pytest.mark.parametrize("side", [1, 2, 4, 8, 32])
def test_hilbert_curve_visits_neighbours(side: int) -> None:
    order = cache.hilbert_order(side, side)
    assert sorted(order.tolist()) == list(range(side * side))
    y, x = np.divmod(order, side)
    assert np.all(np.abs(np.diff(y)) + np.abs(np.diff(x)) == 1)


@given(height=st.integers(1, 40), width=st.integers(1, 40))
def test_hilbert_order_is_a_permutation_of_any_grid(height: int, width: int) -> None:
    assert np.array_equal(np.sort(cache.hilbert_order(height, width)), np.arange(height * width))


@given(traces())
def test_sorting_keeps_the_tokens_and_gathers_equal_sets(drawn: tuple[np.ndarray, int]) -> None:
    trace, n = drawn
    ordered = cache.reorder_tokens(trace, n, "sorted", (1, trace.shape[2]))
    for layer in range(2):
        for image in range(2):
            before = [tuple(sorted(token)) for token in trace[layer, image].tolist()]
            after = [tuple(sorted(token)) for token in ordered[layer, image].tolist()]
            assert sorted(before) == sorted(after)
            changes = sum(a != b for a, b in itertools.pairwise(after))
            assert changes == len(set(after)) - 1  # every set occurs in one run


def test_hilbert_order_keeps_the_class_token_first() -> None:
    trace = np.arange(17).reshape(1, 1, 17, 1)
    ordered = cache.reorder_tokens(trace, 17, "hilbert", (4, 4))[0, 0, :, 0]
    assert ordered[0] == 0
    assert np.array_equal(ordered[1:] - 1, cache.hilbert_order(4, 4))


def test_hilbert_order_helps_where_neighbours_agree() -> None:
    """A 2 x 2 quilt of four regions: raster order crosses the seam in every row, the curve four times at most."""
    y, x = np.divmod(np.arange(256), 16)
    region = 2 * (y // 8) + x // 8
    trace = np.stack([2 * region, 2 * region + 1], axis=-1)[None, None]
    raster = int(cache.previous_token_misses(trace, 8)[0, 0])
    curve = int(cache.previous_token_misses(cache.reorder_tokens(trace, 8, "hilbert", (16, 16)), 8)[0, 0])
    assert raster == 2 * (1 + 31)
    assert curve == 2 * 4 == cache.compulsory_misses(trace, 8)[0, 0]


# --- study ---


def test_cache_study_on_random_routing() -> None:
    rng = np.random.default_rng(0)
    trace = cache.random_routing(rng, layers=6, images=4, tokens=1025, num_experts=16, top_k=4)
    rows = cache.cache_study(trace, SMALL, ZCU104, grid=(32, 32))
    reordered = rows[0]
    assert (reordered.design, reordered.misses, reordered.advantage) == ("reordered", 96.0, 1.0)
    assert 1e3 * reordered.latency_s == pytest.approx(69.002, abs=0.001)
    found = {(row.design, row.order, row.capacity): row for row in rows}
    baseline = found["previous token", "raster", 4]
    assert baseline.advantage == pytest.approx(9.24, abs=0.05)
    assert baseline.latency_s == pytest.approx(reordered.latency_s + baseline.misses * 30.8e-6, rel=1e-9)
    # random routing has no locality to find, but sorting creates some
    assert found["previous token", "hilbert", 4].misses == pytest.approx(baseline.misses, rel=0.02)
    assert found["previous token", "sorted", 4].misses < 0.6 * baseline.misses
    assert found["LRU", "raster", 8].misses == pytest.approx(baseline.misses * 2 / 3, rel=0.05)


def test_local_routing_shrinks_the_advantage() -> None:
    rng = np.random.default_rng(0)
    trace = np.repeat(
        cache.random_routing(rng, layers=6, images=2, tokens=205, num_experts=16, top_k=4), 5, axis=2
    )  # runs of 5 equal tokens
    rows = cache.cache_study(trace, SMALL, ZCU104, grid=(32, 32), orders=("raster",))
    assert cache.miss_ratio(trace, 16) == pytest.approx(205 * 3 / (1024 * 3), rel=0.02)
    assert 2.2 < rows[1].advantage < 3.2
    scaled = cache.scaled_advantage(cache.miss_ratio(trace, 16), SMALL, 1025, ZCU104)
    assert scaled == pytest.approx(rows[1].advantage, rel=0.01)
    assert cache.scaled_advantage(1.0, SMALL, 1025, ZCU104) == pytest.approx(9.238, abs=0.001)
    assert cache.scaled_advantage(0.0, SMALL, 1025, ZCU104) == 1.0


def test_stalls_and_imbalance() -> None:
    queues = np.array([[[10, 50, 0, 100]], [[49, 48, 47, 16]]])
    assert cache.stall_probability(queues, 48.125) == pytest.approx(4 / 7)
    assert cache.imbalance(queues).tolist() == [[2.5], [49 / 40]]
    assert cache.stall_probability(np.zeros((1, 4), dtype=int), 48.0) == 0.0


def test_merged_queues() -> None:
    a, b = one_layer((0, 1), (0, 2)), one_layer((3, 1), (0, 2))
    merged = cache.merge_queues({"semseg": a, "depth": b}, 4)
    assert merged.tolist() == [[[3, 2, 2, 1]]]
    assert np.array_equal(merged, cache.queue_lengths(a, 4) + cache.queue_lengths(b, 4))


# --- bad input ---


def test_bad_input_says_what_to_do() -> None:
    trace = one_layer((0, 1), (2, 3))
    with pytest.raises(UserError, match="outside 0 to 2"):
        cache.queue_lengths(trace, 3)
    with pytest.raises(UserError, match="twice"):
        cache.queue_lengths(one_layer((0, 0)), 3)
    with pytest.raises(UserError, match="shape"):
        cache.queue_lengths(np.zeros((2, 3)), 3)
    with pytest.raises(UserError, match="cache of 1"):
        cache.lru_misses(trace, 4, 1)
    with pytest.raises(UserError, match="5 pinned"):
        cache.pinned_misses(trace, 4, 5)
    with pytest.raises(UserError, match="grid"):
        cache.reorder_tokens(trace, 4, "hilbert", (4, 4))
    with pytest.raises(UserError, match="hilbert"):
        cache.reorder_tokens(trace, 4, "hilber", (1, 2))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the encoder 6 with 4"):
        cache.cache_study(trace, SMALL, ZCU104, grid=(1, 2))
    with pytest.raises(UserError, match="same layers"):
        cache.merge_queues({"a": trace, "b": np.concatenate([trace, trace])}, 4)
