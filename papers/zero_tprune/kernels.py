"""Votes straight from Q and K, and the selection of a stage in one launch: what calls the Triton kernels.

Nothing of size N x N is ever written to memory, so the model keeps its fused attention. Up to 256 tokens one program handles one head
and keeps exp(logits) in registers as half precision between votes (scores then differ from the float32 reference by about 1e-4 of
their size); above, rows are normalised by their log-sum-exp and each vote streams over Q once more (:func:`votes_long`).
:mod:`papers.zero_tprune.selection` is the reference. With ``TRITON_INTERPRET=1`` the kernels run on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from papers.zero_tprune.importance import start_vector, start_weights
from papers.zero_tprune.triton_kernels import log_sum_exp, vote_long, votes_short
from papers.zero_tprune.triton_select import select_top as select_top_kernel
from papers.zero_tprune.triton_select import select_unique as select_unique_kernel

SHORT = 256  # tokens that fit one program

# Widths of two or three column tiles, powers of two. 197 tokens, the most common number, are not worth 256 columns.
TILES = ((32, 32, 0), (64, 16, 0), (64, 32, 0), (64, 64, 0), (128, 16, 0), (128, 32, 0), (128, 64, 0), (128, 64, 16), (128, 64, 32),
         (128, 128, 0))  # fmt: skip

# Rows per tile, warps, pipeline stages and whether tiles are added up in registers, fastest on an H100
# (python -m papers.zero_tprune.gpu --only tune), by columns in units of 64, more than one vote, and bytes per value.
Tuning: TypeAlias = tuple[int, int, int, bool]
TUNED: dict[tuple[int, bool, int], Tuning] = {
    (1, False, 2): (64, 4, 1, True), (2, False, 2): (64, 4, 1, True), (3, False, 2): (64, 4, 3, True), (4, False, 2): (64, 4, 3, False),
    (1, True, 2): (64, 4, 1, True), (2, True, 2): (64, 4, 1, True), (3, True, 2): (64, 8, 1, True), (4, True, 2): (64, 8, 1, True),
    (1, False, 4): (64, 4, 1, True), (2, False, 4): (64, 4, 3, True), (3, False, 4): (64, 4, 3, True), (4, False, 4): (64, 4, 3, False),
    (1, True, 4): (64, 4, 1, True), (2, True, 4): (64, 4, 1, True), (3, True, 4): (64, 8, 1, True), (4, True, 4): (128, 8, 1, True),
}  # fmt: skip
_LOG2E = 1.4426950408889634


def splits(dtype: torch.dtype) -> bool:
    """Whether products run as three bfloat16 products: float32, unless torch is allowed TF32."""
    return dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32


def head_width(d: int) -> bool:
    """Whether the kernels take heads of this width."""
    return d >= 16 and d & (d - 1) == 0 and d <= 128


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def columns(n: int) -> tuple[int, int, int]:
    """Widths of the column tiles that cover n <= 256 tokens with the least waste."""
    return next(widths for widths in TILES if sum(widths) >= n)


def votes(
    q: Tensor,
    k: Tensor,
    index: Tensor | None,
    scale: float,
    readers: int,
    iterations: int,
    *,
    tuning: Tuning | None = None,
) -> Tensor:
    """WPR scores [B, H, n] of the sub-graph on the rows ``index`` [B, n] (int32; all rows if None), rows renormalised, mean 1.

    q, k: [B, H, N, d], the last dimension contiguous; ``tuning``: an entry of :data:`TUNED` to use instead.
    """
    images, heads, tokens, _ = q.shape
    n = tokens if index is None else index.shape[1]
    if n <= SHORT and fits(q, n):
        return _short(q, k, index, n, scale, (readers, *start_weights(n, readers)), iterations, tuning=tuning)
    source, stride = start_vector(n, readers, q.device), 0
    s, spare, lse = (torch.empty(images, heads, n, device=q.device) for _ in range(3))
    place = q if index is None else index
    arguments, flags = _arguments(q, k, n, scale), _flags(q, index)
    grid = (images * heads, -(-n // 64))
    log_sum_exp[grid](q, k, place, lse, *arguments, M=64, N=64, **flags)
    for _ in range(iterations):
        vote_long[grid](q, k, place, lse, source, stride, spare, *arguments, M=64, N=64, **flags)
        source, stride, s, spare = spare, n, spare, s
    return s


def class_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention that the first token pays to every token, per head [B, H, N]: one vote in which it alone has weight."""
    return _short(q, k, None, q.shape[2], scale, (1, 1.0, 0.0), 1, rows=1)


def _short(
    q: Tensor, k: Tensor, index: Tensor | None, n: int, scale: float, start: tuple[int, float, float], iterations: int, *,
    rows: int | None = None, tuning: Tuning | None = None,
) -> Tensor:  # fmt: skip
    """Votes of the first ``rows`` rows up to 256 tokens; ``start``: how many tokens start heavy, and the two weights."""
    images, heads = q.shape[:2]
    s = torch.empty(images, heads, n, device=q.device)
    cached, rows = iterations > 1, n if rows is None else rows
    block, warps, stages, held = tuning or TUNED[-(-n // 64), cached, q.element_size()]
    tiles, tail, rest, (na, nb, nc) = -(-rows // block), 0, rows % block, columns(n)
    if q.element_size() == 2 and not cached and 0 < rest <= 32:  # a last tile of few rows is not worth a whole one
        tiles, tail = rows // block, 16 if rest <= 16 else 32
    votes_short[(images * heads,)](
        q, k, q if index is None else index, s, *_arguments(q, k, n, scale), *start, iterations, M=block, NA=na, NB=nb, NC=nc,
        TILES=tiles, TAIL=tail, CACHED=cached, HELD=held, MASK_A=n < na, num_warps=warps, num_stages=stages, **_flags(q, index),
    )  # fmt: skip
    return s


def _arguments(q: Tensor, k: Tensor, n: int, scale: float) -> tuple[int | float, ...]:
    strides = (q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2))
    return n, q.shape[1], *strides, scale * _LOG2E


def _flags(q: Tensor, index: Tensor | None) -> dict[str, Any]:
    return {"D": q.shape[3], "INDEXED": index is not None, "SPLIT": splits(q.dtype)}


def fits(q: Tensor, tokens: int) -> bool:
    """Whether a program's shared memory holds the keys of ``tokens`` tokens and a tile of queries."""
    size = (-(-tokens // 64) * 64 + 64) * q.shape[-1] * q.element_size()
    return not q.is_cuda or size <= _shared_memory(q.device.index or 0)


@cache
def _shared_memory(device: int) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def select_top(
    s: Tensor, index: Tensor | None, left: int, tokens: int, prefix: int, vhf: tuple[float, float] | None, rms: bool
) -> tuple[Tensor, Tensor]:
    """I-stage on scores [B, H, n]: rows that stay [B, left] (int32) and the same rows of the flattened batch (int64)."""
    images, heads, n = s.shape
    block = max(64, _power_of_two(n))
    out, flat, scratch = _buffers(s, left, block)
    low, high = vhf or (0.0, 0.0)
    select_top_kernel[(images,)](
        s, s if index is None else index, scratch, out, flat, n, left, tokens, prefix, heads, low, high,
        BLOCK=block, RMS=rms, FILTER=vhf is not None, INDEXED=index is not None,
    )  # fmt: skip
    return out, flat


def select_unique(
    s: Tensor, feature: Tensor, drop: int, prefix: int, vhf: tuple[float, float] | None, rms: bool, *, unimportant: bool
) -> tuple[Tensor, Tensor]:
    """S-stage on scores [B, H, N]: rows that stay, as in :func:`select_top`.

    feature: what is compared by cosine [B, G, N, d], its G parts one after the other; ``unimportant``: which half loses tokens.
    """
    images, heads, n = s.shape
    block = max(64, _power_of_two(n))
    out, flat, scratch = _buffers(s, n - drop, block)
    low, high = vhf or (0.0, 0.0)
    tile = 128 if n - prefix > 128 and feature.element_size() == 2 else 64
    select_unique_kernel[(images,)](
        s, feature, scratch, out, flat, n, drop, n - drop, n, prefix, heads, feature.shape[1], low, high,
        feature.stride(0), feature.stride(1), feature.stride(2),
        D=feature.shape[3], BLOCK=block, TILE=tile, RMS=rms, FILTER=vhf is not None, UNIMPORTANT=unimportant,
        SPLIT=splits(feature.dtype), num_warps=8 if tile == 128 else 4,
    )  # fmt: skip
    return out, flat


def _buffers(s: Tensor, left: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    images, device = s.shape[0], s.device
    out = torch.empty(images, left, dtype=torch.int32, device=device)
    return (
        out,
        torch.empty(images, left, dtype=torch.int64, device=device),
        torch.empty(images, 4 * block, device=device),
    )
