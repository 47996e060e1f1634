"""The accelerator model against Tab. 4, hand-worked schedules, and a step-by-step simulation of two buffers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from papers.m3vit import cache, counts, hardware
from papers.m3vit.counts import DATASETS, ENCODERS, Encoder
from papers.m3vit.hardware import MIB, Accelerator
from shared.errors import UserError

SMALL = ENCODERS["small"]
PASCAL, NYUD = 1025, 1201
ZCU104 = Accelerator.from_array(
    macs_per_cycle=1536,
    attention_macs_per_cycle=1536,
    clock_hz=3.0e8,
    bandwidth_bytes_per_s=1.92e10,
    power_w=10.0,
    weight_bits=16,
    router_drain_cycles=1,
)


def ms(tokens: int, design: hardware.Design, encoder: Encoder = SMALL) -> float:
    return 1e3 * float(hardware.frame_latency(encoder, tokens, ZCU104, design=design).total_s)


# --- latency of Tab. 4 ---


def test_latency_by_component_pascal() -> None:
    parts = hardware.compute_latency(SMALL.dense(), PASCAL, ZCU104)
    assert [round(1e3 * float(t), 3) for t in (parts.patch_embedding_s, parts.attention_s, parts.mlp_s)] == [
        0.655,
        36.756,
        31.488,
    ]
    assert parts.router_s == parts.experts_s == parts.exposed_load_s == 0.0
    moe = hardware.compute_latency(SMALL, PASCAL, ZCU104)
    assert moe.experts_s == moe.mlp_s == parts.mlp_s / 2  # K·h = 4D
    assert 1e3 * float(moe.router_s) == pytest.approx(6 * 1025 * 5 / 3e5)  # 5 cycles a token


@pytest.mark.parametrize(
    ("tokens", "dense", "reordered", "cached", "error"),
    [(PASCAL, 68.931, 69.033, 637.478, 0.0006), (NYUD, 84.418, 84.538, 750.557, 0.0065)],
)
def test_published_latencies(tokens: int, dense: float, reordered: float, cached: float, error: float) -> None:
    """NYUD played no part in finding the 1536 MAC/cycle: there the model is 0.6 % too slow."""
    assert ms(tokens, "resident", SMALL.dense()) == pytest.approx(dense, rel=error)
    assert ms(tokens, "reordered") == pytest.approx(reordered, rel=error)
    assert ms(tokens, "cached") == pytest.approx(cached, rel=error)


@pytest.mark.parametrize(("tokens", "overhead"), [(PASCAL, 0.102), (NYUD, 0.120)])
def test_overhead_over_the_dense_vit(tokens: int, overhead: float) -> None:
    assert ms(tokens, "reordered") - ms(tokens, "reordered", SMALL.dense()) == pytest.approx(overhead, abs=0.001)


@pytest.mark.parametrize(
    ("tokens", "misses", "extra"), [(PASCAL, 18_456, 637.478 - 69.033), (NYUD, 21_624, 750.557 - 84.538)]
)
def test_extra_time_of_the_cache_design(tokens: int, misses: int, extra: float) -> None:
    assert 6 * hardware.expected_misses(SMALL, tokens) == misses
    assert hardware.expert_bytes(SMALL, ZCU104) == 591_360
    assert 1e6 * float(hardware.load_s(SMALL, ZCU104)) == pytest.approx(30.8, rel=1e-12)
    assert ms(tokens, "cached") - ms(tokens, "resident") == pytest.approx(extra, abs=0.0006)


def test_ratios_and_energy() -> None:
    assert round(ms(PASCAL, "cached") / ms(PASCAL, "reordered"), 2) == 9.24
    assert round((69.033 + 568.4448) / 69.033, 4) == 9.2344
    assert ms(NYUD, "cached") / ms(NYUD, "reordered") == pytest.approx(8.88, rel=0.01)
    assert round(float(hardware.energy_j(69.033e-3, 10.0)), 3) == 0.690
    assert round(float(hardware.energy_j(10.381e-3, 295.0)), 3) == 3.062
    assert round(float(hardware.energy_j(25.239e-3, 295.0)), 3) == 7.446
    assert round(7.446 / 0.690, 2) == 10.79


def test_traffic_is_192_times_smaller() -> None:
    loads = SMALL.num_moe_blocks * SMALL.num_experts
    assert loads * 591_360 == pytest.approx(56.8e6, rel=0.001)
    assert 18_456 / loads == pytest.approx(192, abs=0.3)


def test_decoder_at_the_same_rate() -> None:
    macs = counts.mean_decoder_macs(SMALL, DATASETS["pascal"])
    assert round(1e3 * float(hardware.decoder_latency_s(macs, ZCU104))) == 112


def test_attention_has_its_own_rate() -> None:
    half = replace(ZCU104, attention_macs_per_s=ZCU104.attention_macs_per_s / 2)
    slow, fast = (hardware.compute_latency(SMALL, PASCAL, a) for a in (half, ZCU104))
    assert slow.attention_s == 2 * fast.attention_s
    assert slow.compute_s - slow.attention_s == pytest.approx(float(fast.compute_s - fast.attention_s))


# --- stall threshold, double buffering ---


def test_stall_threshold() -> None:
    assert float(hardware.stall_threshold_tokens(SMALL, ZCU104)) == pytest.approx(9240 / 192)
    eight_bit = replace(ZCU104, weight_bits=8)
    assert float(hardware.stall_threshold_tokens(SMALL, eight_bit)) == pytest.approx(9240 / 192 / 2)
    assert float(hardware.critical_bandwidth_bytes_per_s(SMALL, PASCAL, ZCU104)) == pytest.approx(3.606e9, rel=1e-3)


def test_loads_stop_hiding_below_the_critical_bandwidth() -> None:
    critical = float(hardware.critical_bandwidth_bytes_per_s(SMALL, PASCAL, ZCU104))
    for factor, waits in ((1.001, False), (0.999, True)):
        device = replace(ZCU104, bandwidth_bytes_per_s=factor * critical)
        latency = hardware.frame_latency(SMALL, PASCAL, device, design="reordered")
        assert (float(latency.exposed_load_s) > 0) == waits


def simulate(queue: list[int], token_s: float, load_s: float, first_exposed: bool) -> float:
    """Two buffers, one memory port, one multiplier array: the events one by one."""
    order = [q for q in queue if q]
    clock, loaded = 0.0, (load_s if first_exposed and order else 0.0)
    for position, length in enumerate(order):
        start = max(clock, loaded)
        clock = start + length * token_s
        if position + 1 < len(order):
            loaded = start + load_s  # the other buffer fills while this expert computes; swap when both are done
    return clock


@given(
    queue=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    token_s=st.floats(0.1, 3.0),
    load_s=st.floats(0.1, 90.0),
    first=st.booleans(),
)
def test_double_buffer_equals_the_simulation(queue: list[int], token_s: float, load_s: float, first: bool) -> None:
    ours = float(hardware.double_buffer_s(queue, token_s, load_s, first_load_exposed=first))
    assert ours == pytest.approx(simulate(queue, token_s, load_s, first), rel=1e-9, abs=1e-9)
    used = [q for q in queue if q]
    if used and not first:
        bound = max(sum(used) * token_s, (len(used) - 1) * load_s + used[-1] * token_s)
        assert ours >= bound * (1 - 1e-9)


def test_double_buffer_limits() -> None:
    assert float(hardware.double_buffer_s([7, 9, 8], 1.0, 7.0)) == 24.0  # all c_i >= l: Σ c_i
    assert float(hardware.double_buffer_s([3, 0, 2, 4], 1.0, 10.0)) == 24.0  # all c_i < l: (M - 1)·l + c_M
    assert float(hardware.double_buffer_s([0, 0], 1.0, 10.0)) == 0.0
    assert float(hardware.double_buffer_s([3, 0, 2, 4], 1.0, 10.0, overlap=False)) == 9 + 2 * 10
    assert float(hardware.double_buffer_s([0, 5], 1.0, 10.0, first_load_exposed=True)) == 15.0


def test_double_buffer_works_on_stacks_of_queues() -> None:
    queues = np.array([[[3, 0, 2, 4], [9, 9, 9, 0]], [[0, 0, 0, 0], [0, 1, 0, 1]]])
    assert hardware.double_buffer_s(queues, 1.0, 10.0).tolist() == [[24.0, 29.0], [0.0, 11.0]]


@given(st.permutations([60, 49, 300, 615, 1025, 0, 2051]))
def test_latency_is_independent_of_routing_above_the_threshold(queue: list[int]) -> None:
    """Zero-overhead switching: any two routings whose queues have 49 tokens or more take the same time."""
    queues = np.tile(np.array([queue], dtype=int), (6, 1))
    assert queues.sum(-1).tolist() == [4 * PASCAL] * 6
    latency = hardware.frame_latency(SMALL, PASCAL, ZCU104, design="reordered", queues=queues)
    assert float(latency.exposed_load_s) == 0.0
    assert float(latency.total_s) == float(hardware.compute_latency(SMALL, PASCAL, ZCU104).total_s)


def test_short_queues_stall_by_hand() -> None:
    # two queues of 1 token before a long one: each waits 9240 - 192 cycles
    queues = np.array([[1, 1, 4098]])
    one = replace(SMALL, num_moe_blocks=1, num_experts=4)
    latency = hardware.frame_latency(one, PASCAL, ZCU104, design="reordered", queues=queues)
    assert float(latency.exposed_load_s) * 3e8 == pytest.approx(2 * (9240 - 192))


def test_without_double_buffering_every_load_but_the_first_waits() -> None:
    latency = hardware.frame_latency(SMALL, PASCAL, ZCU104, design="reordered", overlap=False)
    assert float(latency.exposed_load_s) == pytest.approx(6 * 15 * 30.8e-6)


def test_random_stall_probability_against_sampling() -> None:
    slow = replace(ZCU104, bandwidth_bytes_per_s=3.606e9)  # threshold about the mean queue of 256
    rng = np.random.default_rng(0)
    trace = cache.random_routing(rng, layers=6, images=40, tokens=PASCAL, num_experts=16, top_k=4)
    threshold = float(hardware.stall_threshold_tokens(SMALL, slow))
    sampled = cache.stall_probability(cache.queue_lengths(trace, 16), threshold)
    assert float(hardware.random_stall_probability(SMALL, PASCAL, slow)) == pytest.approx(sampled, abs=0.03)
    assert float(hardware.random_stall_probability(SMALL, PASCAL, ZCU104)) < 1e-60


# --- memory ---


def memory_mib(design: hardware.Design, tokens: int = NYUD, encoder: Encoder = SMALL) -> float:
    return float(hardware.memory_bytes(encoder, tokens, design, 16)) / MIB


def test_memory_of_tab_4_to_the_last_bit() -> None:
    assert memory_mib("reordered", encoder=SMALL.dense()) == 4.828125
    assert memory_mib("reordered") == memory_mib("cached") == 4.83984375
    assert memory_mib("resident") == 11.609619140625
    assert round(memory_mib("resident") / memory_mib("reordered"), 4) == 2.3988


def test_memory_at_1025_tokens() -> None:
    sums = (
        memory_mib("reordered", PASCAL, SMALL.dense()),
        memory_mib("reordered", PASCAL),
        memory_mib("resident", PASCAL),
    )
    assert [round(value, 3) for value in sums] == [4.699, 4.711, 11.481]


@pytest.mark.parametrize(("experts", "ratio"), [(8, 1.47), (16, 2.40), (32, 4.26), (64, 7.94)])
def test_memory_ratio_grows_with_the_experts(experts: int, ratio: float) -> None:
    encoder = replace(SMALL, num_experts=experts)
    assert round(memory_mib("resident", encoder=encoder) / memory_mib("reordered", encoder=encoder), 2) == ratio


def test_memory_per_expert() -> None:
    more = replace(SMALL, num_experts=17)
    words = {d: [sum(hardware.memory_words(e, NYUD, d).values()) for e in (SMALL, more)] for d in hardware.DESIGNS}
    assert words["reordered"][1] - words["reordered"][0] == 384  # one column of the router
    assert words["resident"][1] - words["resident"][0] == 384 + 2 * 384 * 384 + 2 * 384


def test_break_even_at_four_experts() -> None:
    four = replace(SMALL, num_experts=4)
    resident, reordered = (sum(hardware.memory_words(four, NYUD, d).values()) for d in ("resident", "reordered"))
    assert resident - reordered == 1152  # three more sets of output biases


def test_queues_are_not_free() -> None:
    assert 2 * hardware.queue_words(SMALL, NYUD) / MIB == pytest.approx(0.0733, abs=1e-4)


# --- several tasks ---


def test_multi_task() -> None:
    def run(tasks: int, share: bool, merge: bool) -> hardware.MultiTask:
        return hardware.multi_task(SMALL, PASCAL, ZCU104, tasks=tasks, share_prefix=share, merge_queues=merge)

    one = run(1, True, True)
    assert 1e3 * float(one.latency_s) == pytest.approx(ms(PASCAL, "reordered"))
    assert float(one.traffic_bytes) == 96 * 591_360
    assert float(run(5, False, True).traffic_bytes) == float(one.traffic_bytes)  # independent of the number of tasks
    assert float(run(5, False, False).traffic_bytes) == 5 * float(one.traffic_bytes)
    assert float(run(5, False, False).latency_s) == pytest.approx(5 * float(one.latency_s))
    saved = float(run(5, False, True).latency_s) - float(run(5, True, True).latency_s)
    shared_macs = counts.all_tasks_macs(SMALL, DATASETS["pascal"]) - counts.all_tasks_macs(
        SMALL, DATASETS["pascal"], share_prefix=True
    )
    assert saved == pytest.approx(shared_macs / (1536 * 3e8))


def test_dense_encoder_serves_all_tasks_in_one_pass() -> None:
    dense = hardware.multi_task(SMALL.dense(), PASCAL, ZCU104, tasks=5, share_prefix=True, merge_queues=False)
    assert 1e3 * float(dense.latency_s) == pytest.approx(ms(PASCAL, "resident", SMALL.dense()))
    assert dense.traffic_bytes == 0.0


def test_merged_queues_hide_loads_on_a_slow_memory() -> None:
    slow = replace(ZCU104, bandwidth_bytes_per_s=2e9)
    merged, apart = (
        hardware.multi_task(SMALL, PASCAL, slow, tasks=5, share_prefix=False, merge_queues=m) for m in (True, False)
    )
    assert float(merged.latency_s) < float(apart.latency_s)


# --- bad input ---


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(UserError, match="bandwidth_bytes_per_s"):
        replace(ZCU104, bandwidth_bytes_per_s=0.0)
    with pytest.raises(UserError, match="reordered"):
        hardware.frame_latency(SMALL, PASCAL, ZCU104, design="reorderd")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tasks=0"):
        hardware.multi_task(SMALL, PASCAL, ZCU104, tasks=0, share_prefix=True, merge_queues=True)
