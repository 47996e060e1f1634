"""The Triton kernels that vote; :mod:`papers.zero_tprune.kernels` calls them.

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
def _exp_rows(
    q,
    ka,
    kal,
    kb,
    kbl,
    kc,
    kcl,
    bias_a,
    bias_b,
    bias_c,
    scale,
    MASK_A: tl.constexpr,
    NC: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """exp2 of the scaled logits of some rows against two or three groups of columns, shifted by each row's maximum, and the row sums.

    The biases are 0 for columns that exist and -inf for others; with two groups the third result is the second. ``scale`` is positive.
    """
    high, low = _split(q, SPLIT)
    la = _dot(high, low, ka, kal, SPLIT)
    if MASK_A:
        la += bias_a[None, :]
    lb = _dot(high, low, kb, kbl, SPLIT) + bias_b[None, :]
    top = tl.maximum(tl.max(la, 1), tl.max(lb, 1))
    if NC > 0:
        lc = _dot(high, low, kc, kcl, SPLIT) + bias_c[None, :]
        top = tl.maximum(top, tl.max(lc, 1))
    shift = (top * scale)[:, None]  # scaled after the maximum: one multiply-add per logit
    ea = tl.exp2(la * scale - shift)
    eb = tl.exp2(lb * scale - shift)
    total = tl.sum(ea, 1) + tl.sum(eb, 1)
    ec = eb
    if NC > 0:
        ec = tl.exp2(lc * scale - shift)
        total += tl.sum(ec, 1)
    return ea, eb, ec, total


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


@triton.jit
def _first_vote(
    q, index, first, n, stride_qn, ka, kal, kb, kbl, kc, kcl, bias_a, bias_b, bias_c, scale, readers, heavy, light,
    D: tl.constexpr, M: tl.constexpr, MASK_A: tl.constexpr, NC: tl.constexpr, INDEXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """exp(logits) of the rows first … first + M, their sums, and what each row gives per unit of exp(logit)."""
    rows, inside = _row_ids(index, first, n, M, INDEXED)
    tile = _rows(q, rows, inside, stride_qn, D)
    ea, eb, ec, total = _exp_rows(tile, ka, kal, kb, kbl, kc, kcl, bias_a, bias_b, bias_c, scale, MASK_A, NC, SPLIT)
    return ea, eb, ec, total, _start(total, first, n, readers, heavy, light, M)


@triton.jit(do_not_specialize=["n", "heads", "readers", "iterations"])
def votes_short(
    q, k, index, s, n, heads, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, scale, readers, heavy, light,
    iterations, D: tl.constexpr, M: tl.constexpr, NA: tl.constexpr, NB: tl.constexpr, NC: tl.constexpr, TILES: tl.constexpr,
    TAIL: tl.constexpr, CACHED: tl.constexpr, HELD: tl.constexpr, MASK_A: tl.constexpr, INDEXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """All votes of one head of one image (one vote unless CACHED): NA + NB + NC >= n columns, TILES tiles of M rows, then TAIL rows.

    Widths of tiles are powers of two, hence three groups of columns (NC = 0: two). Sums across threads cost more than the votes
    themselves, so tiles are added up first where the registers allow it (HELD).
    """
    scale, heavy, light = (
        tl.cast(scale, tl.float32),
        tl.cast(heavy, tl.float32),
        tl.cast(light, tl.float32),
    )  # compiled: float64
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
    kc, kcl, bias_c, in_c, out_c = kb, kbl, bias_b, in_b, out_b
    if NC > 0:
        ids_c, in_c = _row_ids(index, NA + NB, n, NC, INDEXED)
        kc, kcl = _split(_rows(k, ids_c, in_c, stride_kn, D), SPLIT)
        bias_c = tl.where(in_c, 0.0, float("-inf"))
        out_c = NA + NB + tl.arange(0, NC)
    if CACHED:  # the first vote keeps exp(logits) in half precision, the others only read it
        ea, eb, ec, t0, w = _first_vote(
            q, index, 0, n, stride_qn, ka, kal, kb, kbl, kc, kcl, bias_a, bias_b, bias_c, scale, readers, heavy, light,
            D, M, MASK_A, NC, INDEXED, SPLIT)  # fmt: skip
        sum_a, sum_b, sum_c = ea * w, eb * w, ec * w
        a0, b0, c0 = ea.to(tl.float16), eb.to(tl.float16), ec.to(tl.float16)
        if TILES > 1:
            ea, eb, ec, t1, w = _first_vote(
                q, index, M, n, stride_qn, ka, kal, kb, kbl, kc, kcl, bias_a, bias_b, bias_c, scale, readers, heavy, light,
                D, M, MASK_A, NC, INDEXED, SPLIT)  # fmt: skip
            sum_a, sum_b, sum_c = sum_a + ea * w, sum_b + eb * w, sum_c + ec * w
            a1, b1, c1 = ea.to(tl.float16), eb.to(tl.float16), ec.to(tl.float16)
        if TILES > 2:
            ea, eb, ec, t2, w = _first_vote(
                q, index, 2 * M, n, stride_qn, ka, kal, kb, kbl, kc, kcl, bias_a, bias_b, bias_c, scale, readers, heavy, light,
                D, M, MASK_A, NC, INDEXED, SPLIT)  # fmt: skip
            sum_a, sum_b, sum_c = sum_a + ea * w, sum_b + eb * w, sum_c + ec * w
            a2, b2, c2 = ea.to(tl.float16), eb.to(tl.float16), ec.to(tl.float16)
        if TILES > 3:
            ea, eb, ec, t3, w = _first_vote(
                q, index, 3 * M, n, stride_qn, ka, kal, kb, kbl, kc, kcl, bias_a, bias_b, bias_c, scale, readers, heavy, light,
                D, M, MASK_A, NC, INDEXED, SPLIT)  # fmt: skip
            sum_a, sum_b, sum_c = sum_a + ea * w, sum_b + eb * w, sum_c + ec * w
            a3, b3, c3 = ea.to(tl.float16), eb.to(tl.float16), ec.to(tl.float16)
        a, b = tl.sum(sum_a, 0), tl.sum(sum_b, 0)
        if NC > 0:
            c = tl.sum(sum_c, 0)
        for _ in range(1, iterations):
            tl.store(s + out_a, a, mask=in_a)
            tl.store(s + out_b, b, mask=in_b)
            if NC > 0:
                tl.store(s + out_c, c, mask=in_c)
            tl.debug_barrier()
            w = _weight(s, t0, 0, n, M)
            sum_a, sum_b, sum_c = a0.to(tl.float32) * w, b0.to(tl.float32) * w, c0.to(tl.float32) * w
            if TILES > 1:
                w = _weight(s, t1, M, n, M)
                sum_a, sum_b, sum_c = (
                    sum_a + a1.to(tl.float32) * w,
                    sum_b + b1.to(tl.float32) * w,
                    sum_c + c1.to(tl.float32) * w,
                )
            if TILES > 2:
                w = _weight(s, t2, 2 * M, n, M)
                sum_a, sum_b, sum_c = (
                    sum_a + a2.to(tl.float32) * w,
                    sum_b + b2.to(tl.float32) * w,
                    sum_c + c2.to(tl.float32) * w,
                )
            if TILES > 3:
                w = _weight(s, t3, 3 * M, n, M)
                sum_a, sum_b, sum_c = (
                    sum_a + a3.to(tl.float32) * w,
                    sum_b + b3.to(tl.float32) * w,
                    sum_c + c3.to(tl.float32) * w,
                )
            a, b = tl.sum(sum_a, 0), tl.sum(sum_b, 0)
            if NC > 0:
                c = tl.sum(sum_c, 0)
            tl.debug_barrier()
    else:
        a, b = tl.zeros([NA], tl.float32), tl.zeros([NB], tl.float32)
        if NC > 0:
            c = tl.zeros([NC], tl.float32)
        if HELD:
            sum_a, sum_b = tl.zeros([M, NA], tl.float32), tl.zeros([M, NB], tl.float32)
            if NC > 0:
                sum_c = tl.zeros([M, NC], tl.float32)
        for first in range(0, TILES * M, M):
            ea, eb, ec, _, w = _first_vote(
                q, index, first, n, stride_qn, ka, kal, kb, kbl, kc, kcl, bias_a, bias_b, bias_c, scale, readers, heavy, light,
                D, M, MASK_A, NC, INDEXED, SPLIT)  # fmt: skip
            if HELD:
                sum_a, sum_b = sum_a + ea * w, sum_b + eb * w
                if NC > 0:
                    sum_c += ec * w
            else:
                a, b = a + tl.sum(ea * w, 0), b + tl.sum(eb * w, 0)
                if NC > 0:
                    c += tl.sum(ec * w, 0)
        if HELD:
            a, b = tl.sum(sum_a, 0), tl.sum(sum_b, 0)
            if NC > 0:
                c = tl.sum(sum_c, 0)
        if TAIL > 0:
            ea, eb, ec, _, w = _first_vote(
                q, index, TILES * M, n, stride_qn, ka, kal, kb, kbl, kc, kcl, bias_a, bias_b, bias_c, scale, readers, heavy,
                light, D, TAIL, MASK_A, NC, INDEXED, SPLIT)  # fmt: skip
            a, b = a + tl.sum(ea * w, 0), b + tl.sum(eb * w, 0)
            if NC > 0:
                c += tl.sum(ec * w, 0)
    tl.store(s + out_a, a, mask=in_a)
    tl.store(s + out_b, b, mask=in_b)
    if NC > 0:
        tl.store(s + out_c, c, mask=in_c)


@triton.jit(do_not_specialize=["n", "heads"])
def log_sum_exp(
    q, k, index, lse, n, heads, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, scale,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, INDEXED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of M rows of logits."""
    scale = tl.cast(scale, tl.float32)
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
    scale = tl.cast(scale, tl.float32)
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
