"""Peak memory of a function."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_allocated_bytes(function: Callable[[], object], device: str = "cuda") -> int:
    """Bytes that the CUDA allocator held at most while ``function`` ran, above what it held before.

    Raises:
        RuntimeError: no CUDA device; the CPU allocator keeps no such count.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "peak allocated memory is counted by the CUDA allocator, and this machine has no CUDA device"
        )
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
