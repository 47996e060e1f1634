"""Triton kernels of :func:`papers.mobiletl.functional.shift_act`: one launch forward, one backward (two where a map is large).

The forward kernel reads x once and writes y and a bit per element; the backward kernel reads dy and the bits once and writes dx and
the sums over its share of each channel. The order of the sums is fixed, so results are the same bit for bit from run to run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS_PER_PROGRAM = (
    4096  # elements of a channel that one backward program sums: long enough to amortise, short enough to fill the chip
)


@triton.jit
def _forward_kernel(
    x, y, packed, weight, bias, mean, var, eps, n, plane, channels, ACTIVATION: tl.constexpr, LAST: tl.constexpr, BYTES: tl.constexpr
):  # fmt: skip
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
    bit = tl.arange(0, 8)
    offset = byte[:, None] * 8 + bit[None, :]
    inside = offset < n
    if LAST:
        channel = offset % channels
    else:
        channel = (offset // plane) % channels
    scale = tl.load(weight + channel, mask=inside, other=0.0) * tl.rsqrt(
        tl.load(var + channel, mask=inside, other=1.0) + eps
    )
    centred = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32) - tl.load(
        mean + channel, mask=inside, other=0.0
    )
    u = centred * scale + tl.load(bias + channel, mask=inside, other=0.0)
    if ACTIVATION == "relu":
        out = tl.maximum(u, 0.0)
    elif ACTIVATION == "relu6":
        out = tl.minimum(tl.maximum(u, 0.0), 6.0)
    elif ACTIVATION == "hard_swish":
        out = u * tl.minimum(tl.maximum(u + 3.0, 0.0), 6.0) / 6.0
    else:
        tl.static_assert(ACTIVATION == "silu")
        out = u * tl.sigmoid(u)
    tl.store(y + offset, out, mask=inside)
    ones = ((u >= 0.0) & inside).to(tl.int32) << bit[None, :]
    tl.store(packed + byte, tl.sum(ones, axis=1).to(tl.uint8), mask=byte * 8 < n)


@triton.jit
def _backward_kernel(
    grad, packed, weight, var, eps, grad_x, sums, rows, share, plane, channels,
    LAST: tl.constexpr, INPUT_GRAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_channel = channel < channels
    scale = tl.load(weight + channel, mask=is_channel, other=0.0) * tl.rsqrt(
        tl.load(var + channel, mask=is_channel, other=1.0) + eps
    )
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, rows)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        if LAST:
            offset = row[:, None] * channels + channel[None, :]
        else:
            offset = ((row // plane)[:, None] * channels + channel[None, :]) * plane + (row % plane)[:, None]
        inside = (row < last)[:, None] & is_channel[None, :]
        bits = tl.load(packed + offset // 8, mask=inside, other=0).to(tl.int32) >> (offset % 8)
        through = tl.where((bits & 1) != 0, tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32), 0.0)
        total += through
        if INPUT_GRAD:
            tl.store(grad_x + offset, through * scale[None, :], mask=inside)
    tl.store(sums + tl.program_id(1) * channels + channel, tl.sum(total, axis=0), mask=is_channel)


class TritonShiftAct(torch.autograd.Function):
    """The CUDA path of ``shift_act``; keeps the packed bits, and the layer's constants by reference."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, activation: str
    ) -> Tensor:
        n, channels = x.numel(), x.shape[1]
        ctx.last, ctx.eps = not x.is_contiguous(), eps
        y = torch.empty_like(x)
        packed = torch.empty((n + 7) // 8, dtype=torch.uint8, device=x.device)
        ctx.save_for_backward(packed, weight, var)
        block = 128
        _forward_kernel[(triton.cdiv(n, 8 * block),)](
            x, y, packed, weight, bias, mean, var, eps, n, x.shape[2] * x.shape[3], channels, activation, ctx.last, block, num_warps=4
        )  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, weight, var = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last if ctx.last else torch.contiguous_format)
        batch, channels, height, width = grad.shape
        plane, rows = height * width, batch * height * width
        splits = max(1, triton.cdiv(rows, _ROWS_PER_PROGRAM))
        share = triton.cdiv(rows, splits)
        grad_x = torch.empty_like(grad) if ctx.needs_input_grad[0] else grad
        sums = torch.empty((splits, channels), dtype=torch.float32, device=grad.device)
        tile = (32, 32) if ctx.last else (min(1024, triton.next_power_of_2(rows)), 1)
        _backward_kernel[(triton.cdiv(channels, tile[1]), splits)](
            grad, packed, weight, var, ctx.eps, grad_x, sums, rows, share, plane, channels,
            ctx.last, ctx.needs_input_grad[0], *tile, num_warps=4,
        )  # fmt: skip
        grad_bias = (sums[0] if splits == 1 else sums.sum(0)).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return grad_x if ctx.needs_input_grad[0] else None, None, grad_bias, None, None, None, None
