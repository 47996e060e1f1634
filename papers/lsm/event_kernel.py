"""The event-driven encoder for CPUs, compiled by numba: per step, add the rows of active inputs and of last step's spikes.

Imported only where numba is installed. No fast-math: the update must round twice, as the other back ends do; the sums of rows are exact
in any order (:mod:`papers.lsm.weights`). Weights on the grid are added as 16-bit integers, 32 at once, and widened before they could
overflow; others as floats. Active rows are listed without a branch: a table gives the set bits of a byte. Both need vectors that numba
does not offer, so two small operations are written in its intermediate code. The functions release the interpreter: threads run parts of a
batch, and no pool of numba's is started, whose idle threads would spin beside other workers.
"""
# mypy: allow-untyped-defs, disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES = 32  # columns are padded to a multiple
ROWS_AT_ONCE = 8  # of at most 4,095 grid steps each: their sum fits 16 bits
GATHER_BITS = np.uint64(0x0102040810204080)  # times eight bytes of 0 or 1: their bits in the highest byte

BITS_OF_BYTE = np.zeros((256, 8), np.int32)
NUM_BITS = np.zeros(256, np.int64)
for _byte in range(256):
    _set = [bit for bit in range(8) if _byte >> bit & 1]
    BITS_OF_BYTE[_byte, : len(_set)] = _set
    NUM_BITS[_byte] = len(_set)


def _lanes(context, builder, array_type, array, index, lanes) -> Any:
    """Pointer to ``lanes`` items of an array from ``index`` on."""
    data = context.make_array(array_type)(context, builder, array).data
    start = builder.gep(data, [index])
    return builder.bitcast(start, ir.VectorType(data.type.pointee, lanes).as_pointer())


@intrinsic
def _add_eight_rows(typing, total, column, rows, o0, o1, o2, o3, o4, o5, o6, o7):
    """total[column + i] += the sum of rows[o + column + i] over the eight offsets, for 32 columns; all int16."""

    def generate(context, builder, signature, args):
        out = _lanes(context, builder, signature.args[0], args[0], args[1], LANES)
        parts = [builder.load(out, align=2)]
        for offset in args[3:]:
            pointer = _lanes(context, builder, signature.args[2], args[2], builder.add(offset, args[1]), LANES)
            parts.append(builder.load(pointer, align=2))
        while len(parts) > 1:
            parts = [
                builder.add(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)
            ]
        builder.store(parts[0], out, align=2)
        return context.get_dummy_value()

    return types.void(total, types.int64, rows, *[types.int64] * ROWS_AT_ONCE), generate


@intrinsic
def _put_bits(typing, active, at, table, byte, first):
    """active[at : at + 8] = first + table[byte]."""

    def generate(context, builder, signature, args):
        row = builder.shl(args[3], args[3].type(3))
        bits = builder.load(_lanes(context, builder, signature.args[2], args[2], row, 8), align=4)
        empty = ir.Constant(bits.type, ir.Undefined)
        one = builder.insert_element(empty, args[4], ir.IntType(32)(0))
        firsts = builder.shuffle_vector(one, empty, ir.Constant(bits.type, [0] * 8))
        builder.store(
            builder.add(bits, firsts), _lanes(context, builder, signature.args[0], args[0], args[1], 8), align=4
        )
        return context.get_dummy_value()

    return types.void(
        active, types.int64, types.Array(types.int32, 2, "C", readonly=True), types.int64, types.int32
    ), generate


@njit(nogil=True, cache=True, boundscheck=False)
def pack_bytes(spikes, masks):
    """Bits (B, T, W) of spike trains (B, T, n / 8) as uint64 of bytes; what is left of W stays as it is."""
    for b in range(spikes.shape[0]):
        for t in range(spikes.shape[1]):
            for w in range(spikes.shape[2]):
                masks[b, t, w] = np.uint8((spikes[b, t, w] * GATHER_BITS) >> np.uint64(56))


@njit(inline="always")
def _list_active(masks, fired, active):
    """Rows of the set bits of ``masks``, then of the bytes of ``fired`` that are 1; returns their number."""
    k = 0
    for w in range(masks.shape[0]):
        byte = np.int64(masks[w])
        _put_bits(active, k, BITS_OF_BYTE, byte, np.int32(8 * w))
        k += NUM_BITS[byte]
    first = 8 * masks.shape[0]
    for w in range(fired.shape[0]):
        byte = np.int64((fired[w] * GATHER_BITS) >> np.uint64(56))
        _put_bits(active, k, BITS_OF_BYTE, byte, np.int32(first + 8 * w))
        k += NUM_BITS[byte]
    return k


@njit(nogil=True, cache=True, boundscheck=False)
def encode_steps(masks, rows, width, decay, threshold, groups, counts, added_rows):
    """Counts (B, N) of spike trains as bits (B, T, n_in / 8 bytes).

    ``rows`` is flat: (n_in + width + 1) rows of ``width`` columns of int16, the last one zero; ``threshold`` counts in its steps and
    ``groups`` of eight rows fit 16 bits. ``added_rows`` (B,) gets the rows added. ``width`` must be a multiple of 32.
    """
    batch, steps, input_bytes = masks.shape
    neurons = counts.shape[1]
    zero = np.int32(8 * input_bytes + width)
    u = np.empty(width, np.float32)
    current = np.zeros(width, np.int32)
    short = np.zeros(width, np.int16)
    fired = np.empty(width, np.uint8)
    fired_words = fired.view(np.uint64)
    total = np.empty(width, np.int16)
    active = np.empty(8 * input_bytes + width + 2 * ROWS_AT_ONCE, np.int32)
    for b in range(batch):
        u[:] = 0
        fired[:] = 0
        total[:] = 0
        added = 0
        for t in range(steps):
            k = _list_active(masks[b, t], fired_words, active)
            added += k
            for i in range(ROWS_AT_ONCE):
                active[k + i] = zero
            waiting = 0
            for j in range(0, k, ROWS_AT_ONCE):
                o0, o1, o2, o3 = active[j] * width, active[j + 1] * width, active[j + 2] * width, active[j + 3] * width
                o4, o5, o6, o7 = (
                    active[j + 4] * width,
                    active[j + 5] * width,
                    active[j + 6] * width,
                    active[j + 7] * width,
                )
                for n in range(0, width, LANES):
                    _add_eight_rows(short, n, rows, o0, o1, o2, o3, o4, o5, o6, o7)
                waiting += 1
                if waiting == groups:
                    waiting = 0
                    for n in range(width):
                        current[n] += np.int32(short[n])
                    short[:] = 0
            for n in range(width):
                u[n] += np.float32(current[n] + np.int32(short[n]))
            current[:] = 0
            short[:] = 0
            for n in range(neurons):
                over = u[n] > threshold
                u[n] = np.float32(0.0) if over else decay * u[n]  # the reset and the decay of the next step
                fired[n] = over
                total[n] += np.int16(over)
        for n in range(neurons):
            counts[b, n] = total[n]
        added_rows[b] = added


@njit(nogil=True, cache=True, boundscheck=False)
def encode_floats(masks, rows, width, decay, threshold, groups, counts, added_rows):
    """The same for any weights, ``rows`` float32 in µS: the order of the sum is that of the rows."""
    batch, steps, input_bytes = masks.shape
    neurons = counts.shape[1]
    u = np.empty(width, np.float32)
    current = np.empty(width, np.float32)
    fired = np.empty(width, np.uint8)
    fired_words = fired.view(np.uint64)
    active = np.empty(8 * input_bytes + width + 2 * ROWS_AT_ONCE, np.int32)
    for b in range(batch):
        u[:] = 0
        fired[:] = 0
        counts[b] = 0
        added = 0
        for t in range(steps):
            k = _list_active(masks[b, t], fired_words, active)
            added += k
            current[:] = 0
            for j in range(k):
                row = rows[active[j] * width : (active[j] + 1) * width]
                for n in range(width):
                    current[n] += row[n]
            for n in range(neurons):
                u[n] += current[n]
                over = u[n] > threshold
                u[n] = np.float32(0.0) if over else decay * u[n]
                fired[n] = over
                counts[b, n] += np.int16(over)
        added_rows[b] = added
