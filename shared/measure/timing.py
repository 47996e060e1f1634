"""Alternating measurement of several functions, medians and distribution-free intervals."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one function: the median over rounds, the quartiles, and the rounds themselves."""

    median_s: float
    q1_s: float
    q3_s: float
    rounds_s: tuple[float, ...]


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95 % interval over paired rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """What :func:`measure` found, by function name."""

    device: str
    by_name: Mapping[str, Timing]

    def ratio(self, numerator: str, denominator: str) -> Ratio:
        """Time of ``numerator`` over time of ``denominator``, paired by round: drift of the machine cancels."""
        pairs = zip(self.by_name[numerator].rounds_s, self.by_name[denominator].rounds_s, strict=True)
        return median_interval([a / b for a, b in pairs])


def measure(
    functions: Mapping[str, Callable[[], object]],
    *,
    device: str = "cpu",
    rounds: int = 15,
    min_round_s: float = 0.02,
    warmup: int = 3,
) -> Timings:
    """Time ``functions`` in alternation.

    Args:
        functions: what to run, by name; each call does the same work.
        device: ``cpu`` or ``cuda``; on CUDA the clock is the device's events.
        rounds: how often each function is timed; at least 6, fewer give no 95 % interval.
        min_round_s: calls are repeated inside a round until it lasts about this long.
        warmup: untimed calls before (compilation, caches, allocator).

    Raises:
        ValueError: fewer than six rounds.
    """
    if rounds < 6:
        raise ValueError("a 95 % interval of a median needs at least 6 rounds")
    clock = _cuda_seconds if device.startswith("cuda") else _cpu_seconds
    calls: dict[str, int] = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        calls[name] = max(1, round(min_round_s / max(clock(function, 1), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):  # no function always runs in another's wake
            seconds[name].append(clock(functions[name], calls[name]) / calls[name])
    return Timings(device_name(device), {name: _timing(values) for name, values in seconds.items()})


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    from shared.runner.environment import cpu_name

    return cpu_name()


def median_interval(values: list[float]) -> Ratio:
    """Median with its distribution-free interval of at least 95 % (order statistics of the binomial sign test)."""
    from scipy.stats import binom

    ordered = sorted(values)
    n = len(ordered)
    k = int(binom.ppf(0.025, n, 0.5))
    if binom.cdf(k, n, 0.5) > 0.025:
        k -= 1
    if k < 0:
        return Ratio(statistics.median(ordered), float("-inf"), float("inf"))
    return Ratio(statistics.median(ordered), ordered[k], ordered[n - 1 - k])


def _timing(values: list[float]) -> Timing:
    q1, median, q3 = statistics.quantiles(values, n=4)
    return Timing(median, q1, q3, tuple(values))


def _cpu_seconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - start


def _cuda_seconds(function: Callable[[], object], calls: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
