"""The hash encoding of all experts and levels in one Triton launch, forward and backward.

Points come sorted by expert. A program takes a block of one expert's segment on one level: what differs between experts and levels is a
handful of scalars that it loads once. Which block belongs to which segment is found on the device from the segment bounds, so nothing
waits for the host. Levels are the slow axis of the grid: one level of one expert is hot in the L2 at a time. Hash arithmetic wraps
in uint32; the table may be half precision, sums are float32; the backward pass adds atomically into a float32 gradient.
"""
# mypy: allow-untyped-defs, disable-error-code="untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from papers.switchnerf.hashgrid import Layout

BLOCK = 256


@triton.jit
def _locate(offsets, block, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr):
    """Expert of a block and the points that it covers; every segment is cut into blocks of its own."""
    ids = tl.arange(0, EP)
    valid = ids < E
    begin = tl.load(offsets + ids, mask=valid, other=0)
    end = tl.load(offsets + ids + 1, mask=valid, other=0)
    blocks = (end - begin + BLOCK - 1) // BLOCK
    upto = tl.cumsum(blocks, 0)
    expert = tl.sum(((upto <= block) & valid).to(tl.int32), 0)
    here = ids == expert
    first = tl.sum(tl.where(here, begin + (block - (upto - blocks)) * BLOCK, 0), 0)
    last = tl.sum(tl.where(here, end, 0), 0)
    return expert, first, last


@triton.jit
def _positions(x, point, inside, scale, shift):
    """Lower corner (uint32) and fraction of each axis."""
    px = tl.load(x + point * 3, mask=inside, other=0.0) * scale + shift
    py = tl.load(x + point * 3 + 1, mask=inside, other=0.0) * scale + shift
    pz = tl.load(x + point * 3 + 2, mask=inside, other=0.0) * scale + shift
    ix, iy, iz = tl.floor(px), tl.floor(py), tl.floor(pz)
    corner = (ix.to(tl.int32).to(tl.uint32), iy.to(tl.int32).to(tl.uint32), iz.to(tl.int32).to(tl.uint32))
    return corner[0], corner[1], corner[2], px - ix, py - iy, pz - iz


@triton.jit
def _entry(ix, iy, iz, resolution, dense, mask):
    """Entry of a vertex within its level."""
    if dense:
        top = resolution - 1
        jx = tl.minimum(ix.to(tl.int32), top)
        jy = tl.minimum(iy.to(tl.int32), top)
        jz = tl.minimum(iz.to(tl.int32), top)
        entry = jx + resolution * (jy + resolution * jz)
    else:
        entry = ((ix ^ (iy * 2654435761) ^ (iz * 805459861)) & mask.to(tl.uint32)).to(tl.int32)
    return entry


@triton.jit
def _encode_kernel(
    x, table, offsets, scale, shift, resolution, dense, mask, offset, out,
    E: tl.constexpr, EP: tl.constexpr, L: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward: F features of a block of points on one level."""
    level = tl.program_id(1)
    expert, first, last = _locate(offsets, tl.program_id(0), E, EP, BLOCK)
    if expert >= E:
        return
    key = expert * L + level
    point = first + tl.arange(0, BLOCK)
    inside = point < last
    ix, iy, iz, fx, fy, fz = _positions(x, point, inside, tl.load(scale + key), tl.load(shift + key))
    res = tl.load(resolution + key).to(tl.int32)
    is_dense = tl.load(dense + key) != 0
    bits = tl.load(mask + key).to(tl.int32)
    rows = table + tl.load(offset + key) * F
    feature = tl.arange(0, F)
    total = tl.zeros([BLOCK, F], tl.float32)
    for c in tl.static_range(8):
        bx, by, bz = c & 1, (c >> 1) & 1, c >> 2
        w = (fx if bx else 1.0 - fx) * (fy if by else 1.0 - fy) * (fz if bz else 1.0 - fz)
        entry = _entry(ix + bx, iy + by, iz + bz, res, is_dense, bits)
        values = tl.load(rows + entry[:, None] * F + feature[None, :], mask=inside[:, None], other=0.0)
        total += w[:, None] * values.to(tl.float32)
    target = out + point[:, None] * (L * F) + level * F + feature[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _gradient_kernel(
    x, grad, offsets, scale, shift, resolution, dense, mask, offset, out,
    E: tl.constexpr, EP: tl.constexpr, L: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward: adds the weighted output gradients to the touched entries. Zero gradients (unused slots) are not written."""
    level = tl.program_id(1)
    expert, first, last = _locate(offsets, tl.program_id(0), E, EP, BLOCK)
    if expert >= E:
        return
    key = expert * L + level
    point = first + tl.arange(0, BLOCK)
    inside = point < last
    ix, iy, iz, fx, fy, fz = _positions(x, point, inside, tl.load(scale + key), tl.load(shift + key))
    res = tl.load(resolution + key).to(tl.int32)
    is_dense = tl.load(dense + key) != 0
    bits = tl.load(mask + key).to(tl.int32)
    rows = out + tl.load(offset + key) * F
    feature = tl.arange(0, F)
    source = grad + point[:, None] * (L * F) + level * F + feature[None, :]
    g = tl.load(source, mask=inside[:, None], other=0.0).to(tl.float32)
    wanted = inside[:, None] & (g != 0.0)
    for c in tl.static_range(8):
        bx, by, bz = c & 1, (c >> 1) & 1, c >> 2
        w = (fx if bx else 1.0 - fx) * (fy if by else 1.0 - fy) * (fz if bz else 1.0 - fz)
        entry = _entry(ix + bx, iy + by, iz + bz, res, is_dense, bits)
        tl.atomic_add(rows + entry[:, None] * F + feature[None, :], w[:, None] * g, mask=wanted, sem="relaxed")


def _launch(kernel: Any, x: Tensor, values: Tensor, offsets: Tensor, layout: Layout, out: Tensor) -> None:
    experts = layout.num_experts
    # An upper bound of the number of blocks: every segment may end in one that is not full.
    blocks = triton.cdiv(x.shape[0], BLOCK) + experts
    kernel[(blocks, layout.levels)](
        x, values, offsets, layout.scale, layout.shift, layout.resolution, layout.dense.view(torch.uint8), layout.mask,
        layout.offset, out, E=experts, EP=triton.next_power_of_2(experts), L=layout.levels, F=layout.features, BLOCK=BLOCK,
        num_warps=4,
    )  # fmt: skip


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, offsets: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(x, offsets)
        ctx.layout, ctx.shape, ctx.dtype = layout, table.shape, table.dtype
        out = torch.empty(x.shape[0], layout.width, dtype=table.dtype, device=x.device)
        _launch(_encode_kernel, x, table, offsets, layout, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        x, offsets = ctx.saved_tensors
        out = torch.zeros(ctx.shape, dtype=torch.float32, device=x.device)
        _launch(_gradient_kernel, x, grad.contiguous(), offsets, ctx.layout, out)
        return None, out.to(ctx.dtype), None, None


def encode(x: Tensor, table: Tensor, offsets: Tensor, layout: Layout) -> Tensor:
    """Features (S, levels·features) of float32 points sorted by expert, in the table's type.

    As :func:`papers.switchnerf.hashgrid.encode_reference`. With ``TRITON_INTERPRET=1`` it runs on a CPU.
    """
    result: Tensor = _Encode.apply(x, table, offsets, layout)
    return result
