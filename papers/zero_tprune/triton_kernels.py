"""The Triton kernels behind :mod:`papers.zero_tprune.kernels`.

Legend: n tokens of a sub-graph, D head width, M rows and N columns of a tile. Arguments that change from call to call are not specialised,
so that every layer of a model shares one compiled kernel.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows(base, ids, mask, stride_n, D: tl.constexpr):
    """Rows ``ids`` of a [N, D] matrix at ``base``; zeros where masked."""
    offsets = ids[:, None] * stride_n + tl.arange(0, D)[None, :]
    return tl.load(base + offsets, mask=mask[:, None], other=0.0)


@triton.jit
def _row_ids(index, first, n, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    """Token numbers of rows first … first + BLOCK of a sub-graph, and which of them exist."""
    place = first + tl.arange(0, BLOCK)
    inside = place < n
    ids = place
    if INDEXED:
        ids = tl.load(index + place, mask=inside, other=0)
    return ids, inside


@triton.jit
def _split(x, SPLIT: tl.constexpr):
    """float32 as a sum of two bfloat16, good to 16 bits; other types as they are."""
    high, low = x, x
    if SPLIT:
        high = x.to(tl.bfloat16)
        low = (x - high.to(tl.float32)).to(tl.bfloat16)
    return high, low


@triton.jit
def _dot(x_high, x_low, y_high, y_low, SPLIT: tl.constexpr):
    """x · yᵀ in float32 on the tensor cores."""
    out = tl.dot(x_high, tl.trans(y_high))
    if SPLIT:
        out = tl.dot(x_high, tl.trans(y_low), out)
        out = tl.dot(x_low, tl.trans(y_high), out)
    return out


@triton.jit
def _exp_rows(q, ka, kal, kb, kbl, bias_a, bias_b, scale, MASK_A: tl.constexpr, SPLIT: tl.constexpr):
    """exp2 of the logits of some rows against two groups of columns, shifted by each row's maximum, and the row sums.

    The biases are 0 for columns that exist and -inf for others.
    """
    high, low = _split(q, SPLIT)
    la = _dot(high, low, ka, kal, SPLIT) * scale
    if MASK_A:
        la += bias_a[None, :]
    lb = _dot(high, low, kb, kbl, SPLIT) * scale + bias_b[None, :]
    top = tl.maximum(tl.max(la, 1), tl.max(lb, 1))[:, None]
    ea = tl.exp2(la - top)
    eb = tl.exp2(lb - top)
    return ea, eb, tl.sum(ea, 1) + tl.sum(eb, 1)


@triton.jit
def _start(total, first, n, readers, heavy, light, M: tl.constexpr):
    """What M rows give per unit of exp(logit) in the first vote: start weight over row sum."""
    place = first + tl.arange(0, M)
    weight = tl.where(place < readers, heavy, light)
    return (tl.where(place < n, weight, 0.0) / total)[:, None]


@triton.jit
def _weight(s, total, first, n, M: tl.constexpr):
    """The same in a later vote: score over row sum."""
    place = first + tl.arange(0, M)
    return (tl.load(s + place, mask=place < n, other=0.0) / total)[:, None]


@triton.jit(do_not_specialize=["n", "heads", "readers", "iterations"])
def votes_short(
    q, k, index, s, n, heads, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, scale, readers, heavy, light,
    iterations, D: tl.constexpr, M: tl.constexpr, NA: tl.constexpr, NB: tl.constexpr, TILES: tl.constexpr, TAIL: tl.constexpr,
    CACHED: tl.constexpr, MASK_A: tl.constexpr, INDEXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All votes of one head of one image (one vote unless CACHED): NA + NB >= n columns, TILES tiles of M rows, then TAIL rows.

    Sums across threads cost more than the votes themselves, so tiles are added up first where the registers allow it.
    """
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    q += image.to(tl.int64) * stride_qb + head * stride_qh
    k += image.to(tl.int64) * stride_kb + head * stride_kh
    index += image.to(tl.int64) * n
    s += tl.program_id(0).to(tl.int64) * n
    ids_a, in_a = _row_ids(index, 0, n, NA, INDEXED)
    ids_b, in_b = _row_ids(index, NA, n, NB, INDEXED)
    ka, kal = _split(_rows(k, ids_a, in_a, stride_kn, D), SPLIT)
    kb, kbl = _split(_rows(k, ids_b, in_b, stride_kn, D), SPLIT)
    bias_a = tl.where(in_a, 0.0, float("-inf"))
    bias_b = tl.where(in_b, 0.0, float("-inf"))
    out_a, out_b = tl.arange(0, NA), NA + tl.arange(0, NB)
    if CACHED:  # the first vote keeps exp(logits) in half precision, the others only read it
        rows, inside = _row_ids(index, 0, n, M, INDEXED)
        ea, eb, t0 = _exp_rows(
            _rows(q, rows, inside, stride_qn, D), ka, kal, kb, kbl, bias_a, bias_b, scale, MASK_A, SPLIT
        )
        w = _start(t0, 0, n, readers, heavy, light, M)
        sum_a, sum_b = ea * w, eb * w
        a0, b0 = ea.to(tl.float16), eb.to(tl.float16)
        if TILES > 1:
            rows, inside = _row_ids(index, M, n, M, INDEXED)
            ea, eb, t1 = _exp_rows(
                _rows(q, rows, inside, stride_qn, D), ka, kal, kb, kbl, bias_a, bias_b, scale, MASK_A, SPLIT
            )
            w = _start(t1, M, n, readers, heavy, light, M)
            sum_a, sum_b = sum_a + ea * w, sum_b + eb * w
            a1, b1 = ea.to(tl.float16), eb.to(tl.float16)
        if TILES > 2:
            rows, inside = _row_ids(index, 2 * M, n, M, INDEXED)
            ea, eb, t2 = _exp_rows(
                _rows(q, rows, inside, stride_qn, D), ka, kal, kb, kbl, bias_a, bias_b, scale, MASK_A, SPLIT
            )
            w = _start(t2, 2 * M, n, readers, heavy, light, M)
            sum_a, sum_b = sum_a + ea * w, sum_b + eb * w
            a2, b2 = ea.to(tl.float16), eb.to(tl.float16)
        if TILES > 3:
            rows, inside = _row_ids(index, 3 * M, n, M, INDEXED)
            ea, eb, t3 = _exp_rows(
                _rows(q, rows, inside, stride_qn, D), ka, kal, kb, kbl, bias_a, bias_b, scale, MASK_A, SPLIT
            )
            w = _start(t3, 3 * M, n, readers, heavy, light, M)
            sum_a, sum_b = sum_a + ea * w, sum_b + eb * w
            a3, b3 = ea.to(tl.float16), eb.to(tl.float16)
        a, b = tl.sum(sum_a, 0), tl.sum(sum_b, 0)
        for _ in range(1, iterations):
            tl.store(s + out_a, a, mask=in_a)
            tl.store(s + out_b, b, mask=in_b)
            tl.debug_barrier()
            w = _weight(s, t0, 0, n, M)
            sum_a, sum_b = a0.to(tl.float32) * w, b0.to(tl.float32) * w
            if TILES > 1:
                w = _weight(s, t1, M, n, M)
                sum_a, sum_b = sum_a + a1.to(tl.float32) * w, sum_b + b1.to(tl.float32) * w
            if TILES > 2:
                w = _weight(s, t2, 2 * M, n, M)
                sum_a, sum_b = sum_a + a2.to(tl.float32) * w, sum_b + b2.to(tl.float32) * w
            if TILES > 3:
                w = _weight(s, t3, 3 * M, n, M)
                sum_a, sum_b = sum_a + a3.to(tl.float32) * w, sum_b + b3.to(tl.float32) * w
            a, b = tl.sum(sum_a, 0), tl.sum(sum_b, 0)
            tl.debug_barrier()
    else:
        a, b = tl.zeros([NA], tl.float32), tl.zeros([NB], tl.float32)
        if NA + NB < 256:
            sum_a, sum_b = tl.zeros([M, NA], tl.float32), tl.zeros([M, NB], tl.float32)
        for first in range(0, TILES * M, M):
            rows, inside = _row_ids(index, first, n, M, INDEXED)
            tile = _rows(q, rows, inside, stride_qn, D)
            ea, eb, total = _exp_rows(tile, ka, kal, kb, kbl, bias_a, bias_b, scale, MASK_A, SPLIT)
            w = _start(total, first, n, readers, heavy, light, M)
            if NA + NB < 256:
                sum_a, sum_b = sum_a + ea * w, sum_b + eb * w
            else:
                a, b = a + tl.sum(ea * w, 0), b + tl.sum(eb * w, 0)
        if NA + NB < 256:
            a, b = tl.sum(sum_a, 0), tl.sum(sum_b, 0)
        if TAIL > 0:
            rows, inside = _row_ids(index, TILES * M, n, TAIL, INDEXED)
            tile = _rows(q, rows, inside, stride_qn, D)
            ea, eb, total = _exp_rows(tile, ka, kal, kb, kbl, bias_a, bias_b, scale, MASK_A, SPLIT)
            w = _start(total, TILES * M, n, readers, heavy, light, TAIL)
            a, b = a + tl.sum(ea * w, 0), b + tl.sum(eb * w, 0)
    tl.store(s + out_a, a, mask=in_a)
    tl.store(s + out_b, b, mask=in_b)


@triton.jit(do_not_specialize=["n", "heads"])
def log_sum_exp(
    q, k, index, lse, n, heads, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, INDEXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of M rows of logits."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    q += image.to(tl.int64) * stride_qb + head * stride_qh
    k += image.to(tl.int64) * stride_kb + head * stride_kh
    index += image.to(tl.int64) * n
    first = tl.program_id(1) * M
    rows, inside = _row_ids(index, first, n, M, INDEXED)
    high, low = _split(_rows(q, rows, inside, stride_qn, D), SPLIT)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for column in range(0, n, N):
        ids, columns = _row_ids(index, column, n, N, INDEXED)
        keys, keys_low = _split(_rows(k, ids, columns, stride_kn, D), SPLIT)
        logits = _dot(high, low, keys, keys_low, SPLIT) * scale
        logits = tl.where(columns[None, :], logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        top = higher
    tl.store(lse + tl.program_id(0).to(tl.int64) * n + first + tl.arange(0, M), top + tl.log2(total), mask=inside)


@triton.jit(do_not_specialize=["n", "heads", "s_stride"])
def vote_long(
    q, k, index, lse, s, s_stride, out, n, heads, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, INDEXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One vote for N columns: streams over all rows; no atomics, so the bits do not depend on the schedule of the blocks."""
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    q += image.to(tl.int64) * stride_qb + head * stride_qh
    k += image.to(tl.int64) * stride_kb + head * stride_kh
    index += image.to(tl.int64) * n
    lse += tl.program_id(0).to(tl.int64) * n
    s += tl.program_id(0).to(tl.int64) * s_stride
    column = tl.program_id(1) * N
    ids, columns = _row_ids(index, column, n, N, INDEXED)
    keys, keys_low = _split(_rows(k, ids, columns, stride_kn, D), SPLIT)
    result = tl.zeros([N], tl.float32)
    for first in range(0, n, M):
        rows, inside = _row_ids(index, first, n, M, INDEXED)
        place = first + tl.arange(0, M)
        high, low = _split(_rows(q, rows, inside, stride_qn, D), SPLIT)
        logits = _dot(high, low, keys, keys_low, SPLIT) * scale
        p = tl.exp2(logits - tl.load(lse + place, mask=inside, other=0.0)[:, None])
        result += tl.sum(p * tl.load(s + place, mask=inside, other=0.0)[:, None], 0)
    tl.store(out + tl.program_id(0).to(tl.int64) * n + column + tl.arange(0, N), result, mask=columns)


@triton.jit
def _rank(values, own, place, n, BLOCK: tl.constexpr):
    """How many of the n ``values`` (in memory) come before ``own`` [BLOCK]: higher ones, and equal ones at a lower place."""
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n, 32):
        other = first + tl.arange(0, 32)
        value = tl.load(values + other, mask=other < n, other=float("-inf"))
        before = (value[None, :] > own[:, None]) | (
            (value[None, :] == own[:, None]) & (other[None, :] < place[:, None])
        )
        rank += tl.sum(((other < n)[None, :] & before).to(tl.int32), 1)
    return rank


@triton.jit
def _importance(s, n, prefix, heads, low, high, BLOCK: tl.constexpr, RMS: tl.constexpr, FILTER: tl.constexpr):
    """VHF and EIR of one image: importance of its tokens [BLOCK]."""
    place = tl.arange(0, BLOCK)
    patch = (place >= prefix) & (place < n)
    count = (n - prefix).to(tl.float32)
    passed = tl.zeros([BLOCK], tl.float32)
    every = tl.zeros([BLOCK], tl.float32)
    num_passed = 0.0
    for head in range(heads):
        score = tl.load(s + head * n + place, mask=place < n, other=0.0)
        term = score
        if RMS:
            term = score * score
        every += term
        if FILTER:
            mean = tl.sum(tl.where(patch, score, 0.0), 0) / count
            off = tl.where(patch, score - mean, 0.0)
            variance = tl.sum(off * off, 0) / count
            keep = tl.where((variance >= low) & (variance <= high), 1.0, 0.0)
            passed += keep * term
            num_passed += keep
    total = every / heads
    if FILTER:
        total = tl.where(num_passed > 0.0, passed / tl.maximum(num_passed, 1.0), total)
    if RMS:
        total = tl.sqrt(total)
    return total


@triton.jit
def _emit(keep, index, out, flat, image, n, left, tokens, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    """Write the surviving rows in order: token numbers, and rows of the batch seen as one [B·N, D] matrix."""
    ids, inside = _row_ids(index, 0, n, BLOCK, INDEXED)
    keep = keep & inside
    where = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(out + image * left + where, ids, mask=keep)
    tl.store(flat + image * left + where, (image * tokens).to(tl.int64) + ids, mask=keep)


@triton.jit(do_not_specialize=["n", "left", "tokens", "prefix", "heads"])
def select_top(
    s, index, scratch, out, flat, n, left, tokens, prefix, heads, low, high,
    BLOCK: tl.constexpr, RMS: tl.constexpr, FILTER: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """I-stage: the prefix and the left - prefix patches of highest importance."""
    image = tl.program_id(0)
    index += image * n
    scratch += image * 4 * BLOCK
    value = _importance(s + image * heads * n, n, prefix, heads, low, high, BLOCK, RMS, FILTER)
    place = tl.arange(0, BLOCK)
    tl.store(scratch + place, tl.where((place >= prefix) & (place < n), value, -1.0))
    tl.debug_barrier()
    keep = (place < prefix) | (_rank(scratch + prefix, value, place - prefix, n - prefix, BLOCK) < left - prefix)
    _emit(keep, index, out, flat, image, n, left, tokens, BLOCK, INDEXED)


@triton.jit(do_not_specialize=["n", "drop", "left", "tokens", "prefix", "heads", "parts"])
def select_unique(
    s, feature, scratch, out, flat, n, drop, left, tokens, prefix, heads, parts, low, high, stride_b,
    stride_h, stride_n, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, RMS: tl.constexpr, FILTER: tl.constexpr,
    UNIMPORTANT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """S-stage: all but the ``drop`` patches of one half of the importance order that most resemble one of the other half."""
    image = tl.program_id(0)
    feature += image.to(tl.int64) * stride_b
    values, order, best, gone = (
        scratch + image * 4 * BLOCK,
        scratch + image * 4 * BLOCK + BLOCK,
        scratch + image * 4 * BLOCK + 2 * BLOCK,
        scratch + image * 4 * BLOCK + 3 * BLOCK,
    )
    value = _importance(s + image * heads * n, n, prefix, heads, low, high, BLOCK, RMS, FILTER)
    place = tl.arange(0, BLOCK)
    patch = (place >= prefix) & (place < n)
    tl.store(values + place, tl.where(patch, value, -1.0))
    tl.store(gone + place, tl.zeros([BLOCK], tl.float32))
    tl.debug_barrier()
    rank = _rank(values + prefix, value, place - prefix, n - prefix, BLOCK)
    tl.store(order + rank, place.to(tl.float32), mask=patch)  # whole numbers below 2^24 are exact
    tl.debug_barrier()
    half = (n - prefix) // 2
    other = n - prefix - half
    if UNIMPORTANT:
        a_from, b_from = other, 0
    else:
        a_from, b_from = 0, half
    for a_first in range(0, half, TILE):
        lane_a = a_first + tl.arange(0, TILE)
        a = tl.load(order + a_from + lane_a, mask=lane_a < half, other=0.0).to(tl.int32)
        match = tl.full([TILE], -2.0, tl.float32)
        for b_first in range(0, other, TILE):
            lane_b = b_first + tl.arange(0, TILE)
            b = tl.load(order + b_from + lane_b, mask=lane_b < other, other=0.0).to(tl.int32)
            dots = tl.zeros([TILE, TILE], tl.float32)
            a_norm = tl.zeros([TILE], tl.float32)
            b_norm = tl.zeros([TILE], tl.float32)
            for part in range(parts):
                fa = _rows(feature + part * stride_h, a, lane_a < half, stride_n, D)
                fb = _rows(feature + part * stride_h, b, lane_b < other, stride_n, D)
                ah, al = _split(fa, SPLIT)
                bh, bl = _split(fb, SPLIT)
                dots += _dot(ah, al, bh, bl, SPLIT)
                a_norm += tl.sum(fa.to(tl.float32) * fa.to(tl.float32), 1)
                b_norm += tl.sum(fb.to(tl.float32) * fb.to(tl.float32), 1)
            cosine = dots * tl.rsqrt(tl.maximum(a_norm, 1e-24))[:, None] * tl.rsqrt(tl.maximum(b_norm, 1e-24))[None, :]
            match = tl.maximum(match, tl.max(tl.where((lane_b < other)[None, :], cosine, -2.0), 1))
        tl.store(best + lane_a, match, mask=lane_a < half)
    tl.debug_barrier()
    for a_first in range(0, half, TILE):
        lane_a = a_first + tl.arange(0, TILE)
        match = tl.load(best + lane_a, mask=lane_a < half, other=-2.0)
        similar = _rank(best, match, lane_a, half, TILE) < drop
        a = tl.load(order + a_from + lane_a, mask=lane_a < half, other=0.0).to(tl.int32)
        tl.store(gone + a, similar.to(tl.float32), mask=lane_a < half)
    tl.debug_barrier()
    keep = tl.load(gone + place) < 0.5
    _emit(keep, feature, out, flat, image, n, left, tokens, BLOCK, False)
