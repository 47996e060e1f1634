"""Energy counters: NVML of an NVIDIA board, RAPL of a processor package. A machine without one has no measured energy.

NVML is called through ctypes: the driver brings the library, and one function of it is needed. Its counter refreshes about every 100 ms,
so windows last at least five seconds.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WINDOW_S = 5.0
WARMUP_S = 2.0
POWERCAP = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


@dataclass(frozen=True)
class Window:
    """What one window saw."""

    calls: int
    seconds: float
    energy_j: float


def counter(device: str) -> Callable[[], float] | None:
    """A function that reads the joules since some start, or None where this machine has no counter that can be read."""
    return _rapl() if device == "cpu" else _nvml()


def window(
    work: Callable[[], Any],
    read_j: Callable[[], float],
    device: str,
    *,
    seconds: float = WINDOW_S,
    warmup_s: float = 0.0,
) -> Window:
    """Repeat ``work`` for ``seconds`` after ``warmup_s`` of it; joules and calls of the window."""
    _repeat(work, device, warmup_s)
    before, start = read_j(), time.perf_counter()
    calls = _repeat(work, device, seconds)
    return Window(calls, time.perf_counter() - start, read_j() - before)


def _repeat(work: Callable[[], Any], device: str, seconds: float) -> int:
    start, calls, burst = time.perf_counter(), 0, 1
    while (gone := time.perf_counter() - start) < seconds:
        for _ in range(burst):
            work()
        if device != "cpu":
            torch.cuda.synchronize()
        calls += burst
        spent = time.perf_counter() - start - gone
        burst = max(
            1, min(4 * burst, round(burst * 0.2 / max(spent, 1e-6)))
        )  # bursts of about 0.2 s: the device never waits
    return calls


def _rapl() -> Callable[[], float] | None:
    try:
        POWERCAP.read_text()
    except OSError:
        return None
    return lambda: int(POWERCAP.read_text()) / 1e6


def _nvml() -> Callable[[], float] | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return None

    def read() -> float:
        if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
            raise RuntimeError("the energy counter of the board cannot be read")
        return millijoules.value / 1e3

    try:
        read()
    except RuntimeError:
        return None
    return read
