"""Seconds per call, on the CPU's clock or the GPU's events, and how far the machine can be trusted.

On a GPU a call is timed inside a CUDA graph of several, so that the device works back to back and the host takes no part; what the
host needs to launch a call is measured apart (:func:`host_seconds`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from shared.errors import UserError

Function = Callable[[], Any]

MAX_SPREAD = 0.15  # interquartile range over median of a reference product, beyond which the machine is too noisy
GRAPH_S = 0.004  # how long a graph of one operator is to last on a GPU
RECURS, SAME = 3, 0.05  # a time on a CPU counts when three lie within 5 %
LEAST_S, LIMIT_S = 0.01, 0.25  # how long a call is timed on a CPU


def graph_of(function: Function, calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``calls`` calls one after another. Raises RuntimeError where the function cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def gpu_seconds(function: Function, *, repeats: int = 5, calls: int | None = None) -> float:
    """Median device time of one call inside a CUDA graph."""
    if calls is None:
        function()
        rough = event_seconds(function, 3)
        calls = min(64, max(1, round(GRAPH_S / rough)))
    graph = graph_of(function, calls)
    graph.replay()
    times = [event_seconds(graph.replay, 1) / calls for _ in range(repeats)]
    return statistics.median(times)


def event_seconds(function: Function, calls: int) -> float:
    """Seconds per call between two events of the GPU, launches included."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls


def eager_seconds(function: Function, *, repeats: int = 5) -> float:
    """Median wall time of one call of a model on the GPU as it is run without a graph."""
    for _ in range(2):
        function()
    return statistics.median(event_seconds(function, 3) for _ in range(repeats))


def host_seconds(function: Function, calls: int = 100) -> float:
    """Time that the host needs to launch one call whose work on the GPU is small."""
    for _ in range(10):
        function()
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return statistics.median(rounds)


def cpu_seconds(function: Function, *, limit_s: float = LIMIT_S) -> float:
    """The fastest time of one call that recurs: timing goes on until three lie within 5 % of the fastest, or for ``limit_s``.

    A shared machine only ever adds to a time, by whole slices of its scheduler; a mean or median would be of the other programs. With one
    torch thread the clock is the thread's own, which stands still while another program has the core.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    function()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < RECURS or time.perf_counter() - begin < limit_s:
        start = clock()
        function()
        times.append(clock() - start)
        if sum(value <= (1 + SAME) * min(times) for value in times) >= RECURS and sum(times) > LEAST_S:
            break
    return sorted(times)[min(RECURS, len(times)) - 1]


def spread(device: str, rounds: int = 20) -> float:
    """Interquartile range over median of the timing of a matrix product, made again and again."""
    a = torch.randn(1024, 1024, device=device)
    if device == "cpu":
        times = [cpu_seconds(lambda: a @ a) for _ in range(rounds)]
    else:
        graph = graph_of(lambda: a @ a, 20)
        graph.replay()
        times = [event_seconds(graph.replay, 1) for _ in range(rounds)]
    low, median, high = statistics.quantiles(times, n=4)
    return (high - low) / median


def require_quiet(device: str, limit: float = MAX_SPREAD) -> float:
    """The machine's own spread.

    Raises:
        UserError: it is above ``limit``: the fit would be of the noise.
    """
    found = spread(device)
    if found > limit:
        raise UserError(
            f"this machine is too noisy to calibrate: the time of one matrix product varies by {found:.0%} (limit {limit:.0%}); "
            "end other programs, or give it its own cores, and try again"
        )
    return found
