"""What calls the Triton kernels: the forward pass of one MoE layer without a host synchronisation, for CUDA graphs.

Tiles are chosen by shape (:func:`plan`), never by looking at the routing. The same kernels serve MoE++ and the vanilla layer. For
comparison a plan can also take torch's grouped product between our sort and our combine. With ``TRITON_INTERPRET=1`` the kernels run
on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from papers.moepp import triton_kernels as tk

MAX_EXPERTS = 64  # of the counting sort; more go through torch.sort
_TYPES: dict[torch.dtype, Any] = {
    torch.float32: triton.language.float32,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
}


@dataclass(frozen=True)
class Gemm:
    """Tile, warps and pipeline of one grouped product."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 8
    joint: bool = False  # gate and up projection in one product
    flatten: bool = False
    halves: bool = False  # a tile that is at most half full costs half
    per_sm: int = 1  # programs on each multiprocessor


@dataclass(frozen=True)
class Mix:
    """Tokens, columns and warps of a program that combines."""

    tokens: int
    columns: int
    warps: int


@dataclass(frozen=True)
class Plan:
    """How the two products of a layer run; both have tiles of the same number of rows."""

    backend: Literal["fused", "grouped_mm"]
    first: Gemm
    second: Gemm
    mix: Mix | None = None  # None: by shape

    def __post_init__(self) -> None:
        if self.first.bm != self.second.bm:
            raise ValueError(f"both products work on the same tiles of rows, got {self.first.bm} and {self.second.bm}")


@dataclass(frozen=True)
class Sorted:
    """Assignments grouped by FFN expert, all on the device."""

    position: Tensor  # [T·K] row of each assignment, -1 for zero-computation experts
    token_of_row: Tensor  # [rows]
    ends: Tensor  # [E] row after the last one of each expert
    tile_expert: Tensor
    tile_end: Tensor
    tile_count: Tensor  # [1]
    rows: int  # allocated, an upper bound
    tiles: int


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def sort_assignments(ids: Tensor, experts: int, align: int) -> Sorted:
    """Group the assignments ``ids`` [T, K] (int32) by FFN expert; each group starts at a multiple of ``align``."""
    total, k = ids.numel(), ids.shape[1]
    pad = max(16, _power_of_two(experts))
    block = max(32, min(512, 16384 // pad))
    blocks = -(-total // block)
    tiles = total // align + experts if align > 1 else 1
    rows = tiles * align if align > 1 else total
    make = lambda *shape: torch.empty(*shape, dtype=torch.int32, device=ids.device)  # noqa: E731
    counts, position, token_of_row = make(blocks, pad), make(total), make(rows)
    ends, tile_expert, tile_end, tile_count = make(experts), make(tiles), make(tiles), make(1)
    tk.count_assignments[(blocks,)](ids, counts, total, E=experts, E_PAD=pad, BLOCK=block, num_warps=8)
    tk.place_assignments[(blocks,)](
        ids, counts, position, token_of_row, ends, tile_expert, tile_end, tile_count, total, blocks, tiles, E=experts, E_PAD=pad,
        K=k, BLOCK=block, ALIGN=align, CHUNK=max(1, min(64, 2048 // pad)), TILES_EACH=_power_of_two(-(-tiles // blocks)), num_warps=8,
    )  # fmt: skip
    return Sorted(position, token_of_row, ends, tile_expert, tile_end, tile_count, rows, tiles)


def route(
    x: Tensor,
    w: Tensor,
    k: int,
    carried: Tensor | None = None,
    w_carried: Tensor | None = None,
    *,
    renormalise: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, N] in fp32, gates [T, K] of a softmax over all N experts, ids [T, K] (int32); one pass over x [T, d].

    w: [N, d] fp32; carried, w_carried: the previous layer's logits [T, N] and W_g [N, N], fp32; ``renormalise``: gates sum to 1.
    """
    tokens, d = x.shape
    n = w.shape[0]
    logits = torch.empty(tokens, n, dtype=torch.float32, device=x.device)
    gates = torch.empty(tokens, k, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, k, dtype=torch.int32, device=x.device)
    carry = carried is not None and w_carried is not None
    block = 64 if tokens > 8192 else 16
    tk.route[(-(-tokens // block),)](
        x, w, carried if carry else w, w_carried if carry else w, logits, gates, ids, tokens, D=d, N=n, N_PAD=max(16, _power_of_two(n)),
        K=k, K_PAD=_power_of_two(k), BT=block, BK=64, CARRY=carry, SPLIT=x.dtype == torch.bfloat16, RENORMALISE=renormalise, num_warps=4,
        num_stages=3,
    )  # fmt: skip
    return logits, gates, ids


def gemm(a: Tensor, w: Tensor, place: Sorted, how: Gemm, *, gated: bool) -> Tensor:
    """One product with the experts' ``w``.

    gated: ``a`` are tokens [T, D], picked by row, and w is [E, 2H, D], with a SwiGLU of its halves; else sorted rows and [E, H, D].
    """
    experts, height, depth = w.shape
    h = height // 2 if gated else height
    out = torch.empty(place.rows, h, dtype=a.dtype, device=a.device)
    joint = gated and how.joint
    if joint:
        weights = TensorDescriptor.from_tensor(w.view(experts * 2, h, depth), [2, how.bn, how.bk])
    else:
        weights = TensorDescriptor.from_tensor(w.view(experts * height, depth), [how.bn, how.bk])
    half = how.bm // 2 if how.halves else how.bm
    source, source_half = (a, a) if gated else (TensorDescriptor.from_tensor(a, [bm, how.bk]) for bm in (how.bm, half))
    target = TensorDescriptor.from_tensor(out, [how.bm, how.bn])
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 or a.dtype != torch.float32 else "ieee"
    programs = min(place.tiles * -(-h // how.bn), _multiprocessors(a.device) * how.per_sm)
    tk.expert_gemm[(programs,)](
        source, source_half, weights, target, out, place.token_of_row, place.tile_expert, place.tile_end, place.tile_count, D=depth, H=h,
        BM=how.bm, BN=how.bn, BK=how.bk, GROUP=how.group, GATED=gated, JOINT=joint, FLATTEN=how.flatten, HALVES=how.halves,
        DTYPE=_TYPES[a.dtype], PRECISION=precision, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return out


def combine(
    rows: Tensor, place: Sorted, ids: Tensor, gates: Tensor, x: Tensor, experts: int, w_const: Tensor | None, v_const: Tensor | None,
    copies: int, mix: Mix | None = None,
) -> Tensor:  # fmt: skip
    """Output [T, d] from the experts' rows and the zero-computation experts, one pass."""
    tokens, d = x.shape
    y = torch.empty_like(x)
    constants = 0 if v_const is None else v_const.shape[0]
    mix = mix or Mix(4 if tokens > 2048 else 1, _chunk(d), 4)
    tk.combine[(-(-tokens // mix.tokens),)](
        rows, place.position, ids, gates, x, x if w_const is None else w_const, x if v_const is None else v_const, y, tokens, D=d,
        E=experts, CONST=constants, COPY=copies, K=ids.shape[1], K_PAD=_power_of_two(ids.shape[1]),
        BT=mix.tokens, BD=mix.columns, num_warps=mix.warps,
    )  # fmt: skip
    return y


def _chunk(d: int) -> int:
    """Columns that a program handles at once: the largest power of two in d up to 256, else a masked 256."""
    exact = d & -d
    return min(256, exact) if exact >= 64 else min(256, _power_of_two(d))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def fits(x: Tensor, w_in: Tensor, w_out: Tensor) -> bool:
    """Whether the fused kernels take these tensors: rows of 16-byte multiples, contiguous weights of one type, a supported width."""
    d, h = x.shape[1], w_out.shape[2]
    wide = all(size * x.element_size() % 16 == 0 for size in (d, h))
    same = x.dtype == w_in.dtype == w_out.dtype and x.dtype in _TYPES
    return (
        wide
        and same
        and w_in.is_contiguous()
        and w_out.is_contiguous()
        and d % 16 == 0
        and w_in.shape[0] <= MAX_EXPERTS
    )


def plan(tokens: int, k: int, experts: int, d: int, h: int, dtype: torch.dtype, share: float = 1.0) -> Plan:
    """The way for a layer of this shape; ``share`` of the assignments is expected at FFN experts.

    Small tiles where each expert gets few rows; half tiles where the last of its tiles counts.
    """
    rows = share * tokens * k / experts
    if dtype == torch.float32:
        return Plan("fused", Gemm(64, 32, 32, 8, 2), Gemm(64, 64, 32, 8, 2))
    if rows < 192:
        first = Gemm(64, 64, 64, 4, 3, joint=True, per_sm=2)
        return Plan("fused", first, Gemm(64, 64, 64, 4, 4, per_sm=2))
    halves = rows < 4096  # fewer than 32 tiles
    first = Gemm(128, 128, 64, 8, 3, joint=True, halves=halves)
    return Plan("fused", first, Gemm(128, 256, 64, 8, 3, flatten=not halves, halves=halves))


def forward(
    x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, w_const: Tensor | None, v_const: Tensor | None, copies: int,
    share: float = 1.0, *, how: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Output [T, d] of an MoE layer whose routing is given. No host synchronisation.

    Args:
        x: tokens [T, d], contiguous.
        ids, gates: [T, K], int32 and fp32; ids 0 … E - 1 are FFN experts, then constants, copies and zeros.
        w_in, w_out: [E, 2h, d] (gate before up) and [E, d, h].
        w_const, v_const: [J, 2, d] and [J, d], or None.
        copies: number of copy experts.
        share: expected share of the assignments that goes to FFN experts, for :func:`plan`; any other is right, but slower.
        how: a plan to use instead of :func:`plan`.
    """
    experts, h = w_in.shape[0], w_out.shape[2]
    how = how or plan(x.shape[0], ids.shape[1], experts, x.shape[1], h, x.dtype, share)
    place = sort_assignments(ids, experts, 1 if how.backend == "grouped_mm" else how.first.bm)
    return combine(_rows(x, w_in, w_out, place, how), place, ids, gates, x, experts, w_const, v_const, copies, how.mix)


def _rows(x: Tensor, w_in: Tensor, w_out: Tensor, place: Sorted, how: Plan) -> Tensor:
    """The experts' outputs in sorted order."""
    if how.backend == "grouped_mm":
        picked = x[place.token_of_row.clamp(0, x.shape[0] - 1)]  # rows past the last group are not initialised
        return grouped_mm_rows(picked, w_in, w_out, place.ends)
    return gemm(gemm(x, w_in, place, how.first, gated=True), w_out, place, how.second, gated=False)


def grouped_mm_rows(rows: Tensor, w_in: Tensor, w_out: Tensor, ends: Tensor) -> Tensor:
    """The experts on sorted rows through torch's grouped product; rows past ``ends[-1]`` are left undefined."""
    gate, up = torch.nn.functional.grouped_mm(rows, w_in.transpose(-2, -1), offs=ends).chunk(2, -1)
    return torch.nn.functional.grouped_mm(torch.nn.functional.silu(gate) * up, w_out.transpose(-2, -1), offs=ends)
