"""The Triton kernels behind :mod:`papers.moepp.kernels`: routing, counting sort, grouped product with gather and SwiGLU, combine.

Legend: T tokens, K picks per token, E FFN experts, d model width (D), h expert width (H), BM/BN/BK rows, columns and depth of a tile.
Rows are the assignments to FFN experts, grouped by expert; each group starts at a multiple of ALIGN, so that a tile of BM = ALIGN rows
belongs to one expert and is stored whole. Picks of zero-computation experts have an id of E or more and never become rows. All
sizes that depend on the routing stay on the device: no host synchronisation, and a CUDA graph can hold every launch.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route(
    x, w, carried, w_carried, logits, gates, ids, tokens, D: tl.constexpr, N: tl.constexpr, N_PAD: tl.constexpr, K: tl.constexpr,
    K_PAD: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, CARRY: tl.constexpr, SPLIT: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Router logits in fp32 (Eq. 6), softmax over all N experts (RENORMALISE: over the chosen) and the top K, one program per BT tokens.

    SPLIT: x is bfloat16, and three bfloat16 products with the parts of w are as good as one in fp32.
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < tokens
    expert = tl.arange(0, N_PAD)
    acc = tl.zeros([BT, N_PAD], tl.float32)
    for k in range(0, D, BK):
        depth = k + tl.arange(0, BK)
        a = tl.load(
            x + token.to(tl.int64)[:, None] * D + depth[None, :], mask=inside[:, None] & (depth < D)[None, :], other=0.0
        )
        b = tl.load(
            w + expert[None, :] * D + depth[:, None], mask=(expert < N)[None, :] & (depth < D)[:, None], other=0.0
        )
        if SPLIT:
            high = b.to(tl.bfloat16)
            rest = b - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(a, low, acc)
            acc = tl.dot(a, middle, acc)
            acc = tl.dot(a, high, acc)
        else:
            acc = tl.dot(a.to(tl.float32), b, acc, input_precision="ieee")
    here = inside[:, None] & (expert < N)[None, :]
    place = token.to(tl.int64)[:, None] * N + expert[None, :]
    if CARRY:
        g = tl.load(carried + place, mask=here, other=0.0)
        m = tl.load(
            w_carried + expert[None, :] * N + expert[:, None],
            mask=(expert < N)[None, :] & (expert < N)[:, None],
            other=0.0,
        )
        acc = tl.dot(g, m, acc, input_precision="ieee")
    tl.store(logits + place, acc, mask=here)
    acc = tl.where((expert < N)[None, :], acc, float("-inf"))
    p = tl.exp(acc - tl.max(acc, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    pick = tl.arange(0, K_PAD)[None, :]
    chosen_p = tl.zeros([BT, K_PAD], tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(p, 1, tie_break_left=True)
        chosen = expert[None, :] == best[:, None]
        chosen_p = tl.where(pick == k, tl.sum(tl.where(chosen, p, 0.0), 1)[:, None], chosen_p)
        tl.store(ids + token * K + k, best, mask=inside)
        p = tl.where(chosen, -1.0, p)
    if RENORMALISE:
        chosen_p = chosen_p / tl.sum(chosen_p, 1)[:, None]
    tl.store(gates + token[:, None] * K + pick, chosen_p, mask=inside[:, None] & (pick < K))


@triton.jit
def count_assignments(ids, counts, total, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """How many of each block's assignments go to each FFN expert: counts [blocks, E_PAD]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + place, mask=place < total, other=E)
    column = tl.arange(0, E_PAD)
    hit = (expert[:, None] == column[None, :]) & (expert < E)[:, None]
    tl.store(counts + tl.program_id(0) * E_PAD + column, tl.sum(hit.to(tl.int32), 0))


@triton.jit
def place_assignments(
    ids, counts, position, token_of_row, ends, tile_expert, tile_end, tile_count, total, blocks, tiles, E: tl.constexpr,
    E_PAD: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr, TILES_EACH: tl.constexpr,
):  # fmt: skip
    """The second half of a stable counting sort: the row of every assignment (-1: none), the token of every row, the table of tiles."""
    pid = tl.program_id(0)
    column = tl.arange(0, E_PAD)
    rows = tl.zeros([E_PAD], tl.int32)
    before = tl.zeros([E_PAD], tl.int32)
    for first in range(0, blocks, CHUNK):
        block = first + tl.arange(0, CHUNK)
        some = tl.load(counts + block[:, None] * E_PAD + column[None, :], mask=(block < blocks)[:, None], other=0)
        rows += tl.sum(some, 0)
        before += tl.sum(tl.where((block < pid)[:, None], some, 0), 0)
    padded = (rows + ALIGN - 1) // ALIGN * ALIGN
    stop = tl.cumsum(padded, 0)
    start = stop - padded

    place = pid * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + place, mask=place < total, other=E)
    computed = expert < E
    hit = ((expert[:, None] == column[None, :]) & computed[:, None]).to(tl.int32)
    row = tl.sum(hit * (tl.cumsum(hit, 0) - 1 + (start + before)[None, :]), 1)
    tl.store(position + place, tl.where(computed, row, -1), mask=place < total)
    tl.store(token_of_row + row, place // K, mask=computed)

    tile = pid * TILES_EACH + tl.arange(0, TILES_EACH)
    owner = tl.sum((tile[:, None] * ALIGN >= stop[None, :]).to(tl.int32), 1)
    end = tl.sum(tl.where(owner[:, None] == column[None, :], (start + rows)[None, :], 0), 1)
    tl.store(tile_expert + tile, owner, mask=tile < tiles)
    tl.store(tile_end + tile, end, mask=tile < tiles)
    if pid == 0:
        tl.store(ends + column, start + rows, mask=column < E)
        tl.store(tile_count, tl.sum(padded, 0) // ALIGN)


@triton.jit
def _tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile; GROUP row tiles share their columns of weights in the cache."""
    in_group = GROUP * tiles_n
    first = tile // in_group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _product(
    a, w, out, token_of_row, m, n, expert, end, D: tl.constexpr, H: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, GATED: tl.constexpr, JOINT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The first ROWS rows of tile m, columns of tile n; see :func:`expert_gemm`."""
    if GATED:
        row = m * BM + tl.arange(0, ROWS)
        inside = row < end  # rows that pad a tile are not read: all would hit one cache line
        token = tl.load(token_of_row + row, mask=inside, other=0).to(tl.int64)
        source = a + token[:, None] * D + tl.arange(0, BK)[None, :]
    gate = tl.zeros([ROWS, 2 * BN if JOINT else BN], tl.float32)
    up = tl.zeros([ROWS, BN], tl.float32)
    for k in range(0, D, BK):
        if GATED:
            keep = inside[:, None]
            if D % BK != 0:
                keep = keep & (k + tl.arange(0, BK) < D)[None, :]
            rows = tl.load(source + k, mask=keep, other=0.0)
        else:
            rows = a.load([m * BM, k])
        if JOINT:
            both = w.load([expert * 2, n * BN, k]).reshape(2 * BN, BK)
            gate = tl.dot(rows, both.T, gate, input_precision=PRECISION)
        elif GATED:
            gate = tl.dot(rows, w.load([expert * 2 * H + n * BN, k]).T, gate, input_precision=PRECISION)
            up = tl.dot(rows, w.load([expert * 2 * H + H + n * BN, k]).T, up, input_precision=PRECISION)
        else:
            gate = tl.dot(rows, w.load([expert * H + n * BN, k]).T, gate, input_precision=PRECISION)
    if JOINT:
        gate, up = gate.reshape(ROWS, 2, BN).permute(0, 2, 1).split()
    if GATED:
        gate = gate / (1.0 + tl.exp(-gate)) * up
    if ROWS == BM:
        out.store([m * BM, n * BN], gate.to(DTYPE))
    else:  # a second descriptor would take shared memory for good
        column = n * BN + tl.arange(0, BN)
        target = out + (m * BM + tl.arange(0, ROWS)).to(tl.int64)[:, None] * H + column[None, :]
        tl.store(target, gate.to(DTYPE), mask=(column < H)[None, :])


@triton.jit
def expert_gemm(
    a, a_half, w, out, out_rows, token_of_row, tile_expert, tile_end, tile_count, D: tl.constexpr, H: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, JOINT: tl.constexpr, FLATTEN: tl.constexpr,
    HALVES: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One grouped product, persistent over tiles: out = silu(A·Wg)·(A·Wu) if GATED, else A·W; depth D, H columns.

    A is a descriptor of sorted rows, or if GATED a pointer to tokens, which are picked by row. w describes [E·H or E·2H, D]
    (the gate's H rows of an expert come before the up-projection's), with JOINT [E·2, H, D], one product for both. With HALVES a
    tile that is at most half full, as an expert's last one is half the time, costs half; a_half describes its
    rows, out_rows points to the output.
    """
    tiles_m = tl.load(tile_count)
    tiles_n: tl.constexpr = (H + BN - 1) // BN
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = _tile(tile, tiles_m, tiles_n, GROUP)
        expert = tl.load(tile_expert + m)
        end = tl.load(tile_end + m)
        if HALVES:
            if end - m * BM <= BM // 2:
                _product(
                    a_half,
                    w,
                    out_rows,
                    token_of_row,
                    m,
                    n,
                    expert,
                    end,
                    D,
                    H,
                    BM,
                    BM // 2,
                    BN,
                    BK,
                    GATED,
                    JOINT,
                    DTYPE,
                    PRECISION,
                )
            else:
                _product(
                    a, w, out, token_of_row, m, n, expert, end, D, H, BM, BM, BN, BK, GATED, JOINT, DTYPE, PRECISION
                )
        else:
            _product(a, w, out, token_of_row, m, n, expert, end, D, H, BM, BM, BN, BK, GATED, JOINT, DTYPE, PRECISION)


@triton.jit
def combine(
    rows, position, ids, gates, x, w_const, v_const, y, tokens, D: tl.constexpr, E: tl.constexpr, CONST: tl.constexpr,
    COPY: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y = Σ g·FFN row + Σ over copy and constant picks, in one pass over BT tokens; rows that a token does not need are not read.

    ids from E on: CONST constant experts, then COPY copies, then zeros. A constant expert gives a1·x + a2·v with
    a1 = sigmoid((w1 - w2)·x) (Eq. 5).
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    inside = token < tokens
    base = token.to(tl.int64)[:, None] * D
    on_x = tl.zeros([BT], tl.float32)
    on_v = tl.zeros([BT, K_PAD], tl.float32)  # what each pick gives to its constant vector
    pick = tl.arange(0, K_PAD)[None, :]
    wants_x = inside & (token < 0)
    if CONST + COPY > 0:
        for k in tl.static_range(K):
            expert = tl.load(ids + token * K + k, mask=inside, other=0)
            gate = tl.load(gates + token * K + k, mask=inside, other=0.0)
            wants_x = wants_x | ((expert >= E) & (expert < E + CONST + COPY))
            share = tl.where((expert >= E + CONST) & (expert < E + CONST + COPY), 1.0, 0.0)
            if CONST > 0:
                constant = (expert >= E) & (expert < E + CONST)
                products = tl.zeros([BT, BD], tl.float32)  # summed once, after the last column
                for first in tl.static_range(0, D, BD):
                    column = first + tl.arange(0, BD)
                    here = constant[:, None] & (column < D)[None, :]
                    value = tl.load(x + base + column[None, :], mask=here, other=0.0).to(tl.float32)
                    weight = w_const + (expert - E)[:, None] * (2 * D) + column[None, :]
                    w1 = tl.load(weight, mask=here, other=0.0).to(tl.float32)
                    w2 = tl.load(weight + D, mask=here, other=0.0).to(tl.float32)
                    products += value * (w1 - w2)
                score = tl.sum(products, 1)
                share += tl.where(constant, tl.sigmoid(score), 0.0)
                on_v = tl.where((pick == k) & constant[:, None], (gate * tl.sigmoid(-score))[:, None], on_v)
            on_x += gate * share
    for first in tl.static_range(0, D, BD):
        column = first + tl.arange(0, BD)
        wide = (column < D)[None, :]
        acc = tl.zeros([BT, BD], tl.float32)
        for k in tl.static_range(K):
            gate = tl.load(gates + token * K + k, mask=inside, other=0.0)
            row = tl.load(position + token * K + k, mask=inside, other=-1).to(tl.int64)
            value = tl.load(rows + row[:, None] * D + column[None, :], mask=(row >= 0)[:, None] & wide, other=0.0)
            acc += gate[:, None] * value.to(tl.float32)
        if CONST + COPY > 0:
            value = tl.load(x + base + column[None, :], mask=wants_x[:, None] & wide, other=0.0)
            acc += on_x[:, None] * value.to(tl.float32)
        if CONST > 0:
            for k in tl.static_range(K):
                expert = tl.load(ids + token * K + k, mask=inside, other=0)
                here = ((expert >= E) & (expert < E + CONST))[:, None] & wide
                vector = tl.load(v_const + (expert - E)[:, None] * D + column[None, :], mask=here, other=0.0)
                acc += tl.sum(tl.where(pick == k, on_v, 0.0), 1)[:, None] * vector.to(tl.float32)
        tl.store(y + base + column[None, :], acc.to(y.dtype.element_ty), mask=inside[:, None] & wide)
