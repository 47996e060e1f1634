"""The Triton kernels that select tokens of an image in one launch: VHF, EIR, ranks, and the match of the S-stage.

Legend: n tokens, D feature width of a part, BLOCK >= n a power of two. Arguments that change from call to call are not specialised, so
that every layer of a model shares one compiled kernel.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from papers.zero_tprune.triton_kernels import _dot, _row_ids, _rows, _split


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
    low, high = tl.cast(low, tl.float32), tl.cast(high, tl.float32)
    place = tl.arange(0, BLOCK)
    patch = (place >= prefix) & (place < n)
    count = tl.cast(n - prefix, tl.float32)
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
