"""Eager execution on a GPU: the host launches one kernel after another, and the device works on them in order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def launched_latency_s(kernel_s: Array, launch_s: Array) -> Array:
    """Time until the last kernel is done, s.

    Kernel i starts when it is launched and its predecessor is done: end_i = max(end_{i-1}, L_i) + k_i with L_i the sum of launches up to
    i. Unrolled, end = S + max_i (L_i - S_{i-1}) with S the running sum of kernels, which is never less than the larger of the two sums'
    bounds S + L_0 and L + k_last. Shape (...).

    Args:
        kernel_s: time of each kernel on the device in the order of execution, (..., n).
        launch_s: time that the host takes to launch each, (..., n).
    """
    kernel_s, launch_s = np.asarray(kernel_s), np.asarray(launch_s)
    done = np.cumsum(kernel_s, axis=-1)
    waiting = np.cumsum(launch_s, axis=-1) - (done - kernel_s)
    return np.asarray(done[..., -1] + waiting.max(axis=-1))
