"""The hash encoding as compiled loops for a CPU: level by level, so that one level's table stays in the cache.

Every (expert, level) owns its part of the gradient, so threads never meet and sums have one order: the same bits with any number of
threads. As many threads as torch has.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from papers.switchnerf.hashgrid import PRIMES, Layout

_P1, _P2 = np.uint32(PRIMES[1]), np.uint32(PRIMES[2])
_ONE, _UNIT = np.float32(1.0), np.uint32(1)
_MIN_POINTS = 4096  # below, threads cost more than they save


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _axis(position, factor, dense, resolution):
    """Fraction along one axis and the two corners' shares of the index: a product that wraps for a hash, rows for a dense level."""
    low = np.uint32(position)
    high = low + _UNIT
    fraction = position - np.float32(low)
    if dense:  # the upper face clamps: plain arithmetic would run into a foreign entry
        low, high = min(low, resolution - _UNIT), min(high, resolution - _UNIT)
    return fraction, np.uint32(low * factor), np.uint32(high * factor)


@njit(nogil=True, cache=True, error_model="numpy")
def _forward(x, table, first, last, scale, shift, resolution, dense, mask, offset, column, out):
    """Points first … last of one expert on one level; writes columns ``column`` on of ``out``."""
    features = table.shape[1]
    fy, fz = (resolution, resolution * resolution) if dense else (_P1, _P2)
    for i in range(first, last):
        wx, x0, x1 = _axis(x[i, 0] * scale + shift, _UNIT, dense, resolution)
        wy, y0, y1 = _axis(x[i, 1] * scale + shift, fy, dense, resolution)
        wz, z0, z1 = _axis(x[i, 2] * scale + shift, fz, dense, resolution)
        a, b = np.float32(0.0), np.float32(0.0)
        for f in range(2, features):
            out[i, column + f] = 0.0
        for c in range(8):
            w = (wx if c & 1 else _ONE - wx) * (wy if c & 2 else _ONE - wy) * (wz if c & 4 else _ONE - wz)
            cx, cy, cz = x1 if c & 1 else x0, y1 if c & 2 else y0, z1 if c & 4 else z0
            entry = offset + np.int64(cx + cy + cz if dense else (cx ^ cy ^ cz) & mask)
            a += w * table[entry, 0]  # the first two features in registers
            if features > 1:
                b += w * table[entry, 1]
            for f in range(2, features):
                out[i, column + f] += w * table[entry, f]
        out[i, column] = a
        if features > 1:
            out[i, column + 1] = b


@njit(nogil=True, cache=True, error_model="numpy")
def _backward(x, grad, first, last, scale, shift, resolution, dense, mask, offset, column, out):
    """The transpose of :func:`_forward`: adds to the rows of ``out`` that the level owns."""
    features = out.shape[1]
    fy, fz = (resolution, resolution * resolution) if dense else (_P1, _P2)
    for i in range(first, last):
        wx, x0, x1 = _axis(x[i, 0] * scale + shift, _UNIT, dense, resolution)
        wy, y0, y1 = _axis(x[i, 1] * scale + shift, fy, dense, resolution)
        wz, z0, z1 = _axis(x[i, 2] * scale + shift, fz, dense, resolution)
        for c in range(8):
            w = (wx if c & 1 else _ONE - wx) * (wy if c & 2 else _ONE - wy) * (wz if c & 4 else _ONE - wz)
            cx, cy, cz = x1 if c & 1 else x0, y1 if c & 2 else y0, z1 if c & 4 else z0
            entry = offset + np.int64(cx + cy + cz if dense else (cx ^ cy ^ cz) & mask)
            for f in range(features):
                out[entry, f] += w * grad[i, column + f]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _run(loop: Callable[..., None], x: Any, values: Any, bounds: list[int], layout: Layout, out: Any) -> None:
    """``loop`` on every (level, expert) with points."""
    constants = [
        t.cpu().numpy()
        for t in (layout.scale, layout.shift, layout.resolution, layout.dense, layout.mask, layout.offset)
    ]
    scale, shift, resolution, dense, mask, offset = constants

    def one(level: int, expert: int) -> None:
        key = (expert, level)
        loop(
            x, values, bounds[expert], bounds[expert + 1], scale[key], shift[key], np.uint32(resolution[key]), dense[key],
            np.uint32(mask[key]), offset[key], level * layout.features, out,
        )  # fmt: skip

    tasks = [
        (level, expert)
        for level in range(layout.levels)
        for expert in range(layout.num_experts)
        if bounds[expert] < bounds[expert + 1]
    ]
    threads = torch.get_num_threads()
    if threads == 1 or x.shape[0] < _MIN_POINTS:
        for task in tasks:
            one(*task)
    else:
        list(_pool(threads).map(lambda task: one(*task), tasks))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, offsets: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds, ctx.layout, ctx.shape = offsets.tolist(), layout, table.shape
        out = torch.empty(x.shape[0], layout.width, dtype=table.dtype)
        _run(_forward, x.numpy(), table.detach().numpy(), ctx.bounds, layout, out.numpy())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        out = torch.zeros(ctx.shape, dtype=grad.dtype)
        _run(_backward, x.numpy(), grad.contiguous().numpy(), ctx.bounds, ctx.layout, out.numpy())
        return None, out, None, None


def encode(x: Tensor, table: Tensor, offsets: Tensor, layout: Layout) -> Tensor:
    """Features (S, levels·features) of float32 points sorted by expert; as :func:`papers.switchnerf.hashgrid.encode_reference`."""
    result: Tensor = _Encode.apply(x, table, offsets, layout)
    return result
