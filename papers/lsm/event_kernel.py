"""The event-driven encoder for CPUs, compiled by numba: per step, add the rows of active inputs and of last step's spikes.

Imported only where numba is installed. No fast-math: the update must round twice, as the other back ends do; the sums of rows are exact
in any order (:mod:`papers.lsm.weights`), so the compiler and the unrolling may order them freely. Weights on the grid are added as 16-bit
integers, others as floats. Spikes are bytes, read eight at a time: a word without a spike costs one comparison.
"""
# mypy: allow-untyped-defs, disable-error-code="untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numba.cpython.unsafe.numbers import trailing_zeros

ROWS_AT_ONCE = 8  # of at most 4,095 grid steps each: their sum fits 16 bits


@njit(inline="always")
def _append_active(words, offset, active, k):
    """Indices of the bytes that are set, from k on; returns how many there are then."""
    for w in range(words.shape[0]):
        word = words[w]
        while word != 0:
            active[k] = offset + 8 * w + (np.int64(trailing_zeros(word)) >> 3)
            word &= word - np.uint64(1)
            k += 1
    return k


@njit(parallel=True, cache=True, boundscheck=False)
def encode_steps(spikes, stacked, unit, decay, threshold, counts, added_rows):
    """Counts (B, N) of spike trains (B, T, n_in / 8) as uint64 of bytes; ``stacked`` (n_in + N, N) int16 in units of ``unit`` µS.

    ``added_rows`` (B,) gets the rows added. N must be a multiple of 8 and n_in the padded number of inputs.
    """
    batch, steps, width = spikes.shape
    rows, neurons = stacked.shape
    for b in prange(batch):
        u = np.zeros(neurons, np.float32)
        current = np.empty(neurons, np.int32)
        fired = np.zeros(neurons, np.uint8)
        fired_words = fired.view(np.uint64)
        total = np.zeros(neurons, np.int16)
        active = np.empty(rows, np.int64)
        added = 0
        for t in range(steps):
            k = _append_active(spikes[b, t], 0, active, 0)
            k = _append_active(fired_words, 8 * width, active, k)
            added += k
            for n in range(neurons):
                current[n] = 0
            j = 0
            while j + 8 <= k:
                a, b_, c, d = stacked[active[j]], stacked[active[j + 1]], stacked[active[j + 2]], stacked[active[j + 3]]
                e, f, g, h = (
                    stacked[active[j + 4]],
                    stacked[active[j + 5]],
                    stacked[active[j + 6]],
                    stacked[active[j + 7]],
                )
                for n in range(neurons):
                    left = np.int16(np.int16(a[n] + b_[n]) + np.int16(c[n] + d[n]))
                    right = np.int16(np.int16(e[n] + f[n]) + np.int16(g[n] + h[n]))
                    current[n] += np.int32(np.int16(left + right))
                j += 8
            while j < k:
                a = stacked[active[j]]
                for n in range(neurons):
                    current[n] += np.int32(a[n])
                j += 1
            for n in range(neurons):
                kept = np.float32(0.0) if fired[n] else decay * u[n]
                u[n] = kept + np.float32(current[n]) * unit
                fired[n] = u[n] > threshold
                total[n] += fired[n]
        for n in range(neurons):
            counts[b, n] = total[n]
        added_rows[b] = added


@njit(parallel=True, cache=True, boundscheck=False)
def encode_floats(spikes, stacked, unit, decay, threshold, counts, added_rows):
    """The same for any weights, ``stacked`` float32 in µS (``unit`` is 1): the order of the sum is that of the rows."""
    batch, steps, width = spikes.shape
    rows, neurons = stacked.shape
    for b in prange(batch):
        u = np.zeros(neurons, np.float32)
        current = np.empty(neurons, np.float32)
        fired = np.zeros(neurons, np.uint8)
        fired_words = fired.view(np.uint64)
        total = np.zeros(neurons, np.int16)
        active = np.empty(rows, np.int64)
        added = 0
        for t in range(steps):
            k = _append_active(spikes[b, t], 0, active, 0)
            k = _append_active(fired_words, 8 * width, active, k)
            added += k
            for n in range(neurons):
                current[n] = np.float32(0.0)
            for j in range(k):
                row = stacked[active[j]]
                for n in range(neurons):
                    current[n] += row[n]
            for n in range(neurons):
                kept = np.float32(0.0) if fired[n] else decay * u[n]
                u[n] = kept + current[n] * unit
                fired[n] = u[n] > threshold
                total[n] += fired[n]
        for n in range(neurons):
            counts[b, n] = total[n]
        added_rows[b] = added
