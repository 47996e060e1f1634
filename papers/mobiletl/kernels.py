"""Triton kernels of :func:`papers.mobiletl.functional.shift_act`: one launch forward, one backward (two where a map is large).

The forward kernel reads x once and writes y and a bit per element; the backward kernel reads dy and the bits once and writes dx and
the sums over its share of each channel. The order of the sums is fixed, so results are the same bit for bit from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BYTES = 128  # of packed bits that one forward program writes
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
    grad, packed, weight, var, gate, mean_grad, eps, grad_x, sums, rows, share, plane, channels,
    LAST: tl.constexpr, INPUT_GRAD: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
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
        upstream = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            vector = (row // plane)[:, None] * channels + channel[None, :]
            upstream = upstream * tl.load(gate + vector, mask=inside, other=0.0)
            upstream += tl.load(mean_grad + vector, mask=inside, other=0.0) / plane
        through = tl.where((bits & 1) != 0, upstream, 0.0)
        total += through
        if INPUT_GRAD:
            tl.store(grad_x + offset, through * scale[None, :], mask=inside)
    tl.store(sums + tl.program_id(1) * channels + channel, tl.sum(total, axis=0), mask=is_channel)


@triton.jit
def _gate_kernel(
    grad, y, gate, out, plane, channels, LAST: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    image = tl.program_id(1)
    is_channel = channel < channels
    total = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for start in range(0, plane, ROWS):
        place = start + tl.arange(0, ROWS)
        if LAST:
            offset = (image * plane + place)[None, :] * channels + channel[:, None]
        else:
            offset = (image * channels + channel)[:, None] * plane + place[None, :]
        inside = is_channel[:, None] & (place < plane)[None, :]
        upstream = tl.load(grad + offset, mask=inside, other=0.0).to(tl.float32)
        total += upstream * tl.load(y + offset, mask=inside, other=0.0).to(tl.float32)
    vector = image * channels + channel
    value = tl.load(gate + vector, mask=is_channel, other=0.0)
    slope = tl.where((value > 0.0) & (value < 1.0), 1.0 / 6.0, 0.0)
    tl.store(out + vector, tl.sum(total, axis=1) * slope, mask=is_channel)


def step_forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, activation: str, *, overwrite: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """The CUDA path of :func:`papers.mobiletl.functional.step_forward`; keeps the bits, and the layer's constants by reference."""
    n, channels = x.numel(), x.shape[1]
    y = x if overwrite else torch.empty_like(x)
    packed = torch.empty((n + 7) // 8, dtype=torch.uint8, device=x.device)
    _forward_kernel[(triton.cdiv(n, 8 * _BYTES),)](
        x, y, packed, weight, bias, mean, var, eps, n, x.shape[2] * x.shape[3], channels, activation, not x.is_contiguous(), _BYTES
    )  # fmt: skip
    return y, (packed, weight, var)


def step_backward(
    grad: Tensor, kept: tuple[Tensor, ...], eps: float, *, channels_last: bool, input_grad: bool, bias_grad: bool, overwrite: bool,
    gate: Tensor | None, mean_grad: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The CUDA path of :func:`papers.mobiletl.functional.step_backward`; ``grad`` is in the layout of the forward pass."""
    packed, weight, var = kept
    batch, channels, height, width = grad.shape
    plane, rows = height * width, batch * height * width
    splits = max(1, triton.cdiv(rows, _ROWS_PER_PROGRAM))
    grad_x = torch.empty_like(grad) if input_grad and not overwrite else grad
    sums = torch.empty((splits, channels), dtype=torch.float32, device=grad.device)
    tile = (32, 32) if channels_last else (min(1024, triton.next_power_of_2(rows)), 1)
    _backward_kernel[(triton.cdiv(channels, tile[1]), splits)](
        grad, packed, weight, var, grad if gate is None else gate, grad if mean_grad is None else mean_grad, eps, grad_x, sums, rows,
        triton.cdiv(rows, splits), plane, channels, channels_last, input_grad, gate is not None, *tile,
    )  # fmt: skip
    grad_bias = (sums[0] if splits == 1 else sums.sum(0)).to(weight.dtype) if bias_grad else None
    return grad_x if input_grad else None, grad_bias


def gate_backward(grad: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Gradient before a hard sigmoid whose result ``gate`` (N, C) multiplied the map ``y``: (N, C), from the product's gradient."""
    batch, channels, height, width = y.shape
    out = torch.empty_like(gate)
    columns, plane = 32, height * width
    _gate_kernel[(triton.cdiv(channels, columns), batch)](
        grad, y, gate, out, plane, channels, not y.is_contiguous(), columns, min(64, triton.next_power_of_2(plane))
    )
    return out
