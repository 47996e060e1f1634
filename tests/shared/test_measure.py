"""Timing: paired ratios and their intervals."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.measure import measure, peak_allocated_bytes
from shared.measure.timing import Timing, Timings, median_interval


def test_ratio_of_sleeps_is_their_ratio() -> None:
    timings = measure({"slow": lambda: time.sleep(0.012), "fast": lambda: time.sleep(0.004)}, rounds=7, min_round_s=0.0)
    ratio = timings.ratio("slow", "fast")
    assert ratio.low <= ratio.median <= ratio.high
    assert 2.0 < ratio.median < 3.5  # 3, less what a busy machine adds to both


def test_ratios_are_paired_by_round() -> None:
    """A machine that slows down tenfold midway changes both times, not their ratio."""
    slow = (2.0, 2.0, 2.0, 20.0, 20.0, 20.0)
    fast = (1.0, 1.0, 1.0, 10.0, 10.0, 10.0)
    timings = Timings("cpu", {"a": Timing(0, 0, 0, slow), "b": Timing(0, 0, 0, fast)})
    ratio = timings.ratio("a", "b")
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 2.0, 2.0)


def test_interval_of_the_median_by_hand() -> None:
    # n = 6: P(all on one side) = 1/64 a side, so the extremes make a 96.9 % interval. n = 9: the second of each side, 2·10/512 = 3.9 %.
    assert median_interval([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).low == 1.0
    nine = median_interval([float(i) for i in range(9)])
    assert (nine.low, nine.median, nine.high) == (1.0, 4.0, 7.0)


@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=60))
def test_interval_contains_the_median(values: list[float]) -> None:
    ratio = median_interval(values)
    assert min(values) <= ratio.low <= ratio.median <= ratio.high <= max(values)


def test_too_few_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 6"):
        measure({"a": lambda: None}, rounds=5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_peak_memory_without_cuda_says_so() -> None:
    with pytest.raises(RuntimeError, match="no CUDA device"):
        peak_allocated_bytes(lambda: None)
