"""Inputs and outputs of radiance fields: frequency and spherical-harmonics encodings, contraction, density activations."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MAX_EXPONENT = 15.0  # exp of more overflows half precision


def frequency_encoding(x: Tensor, frequencies: int) -> Tensor:
    """x, then sin and cos of x·2^k for k = 0 … frequencies - 1, **without** a factor of π: (..., D) -> (..., D + 2·D·frequencies)."""
    parts = [x]
    for k in range(frequencies):
        parts += [torch.sin(x * 2**k), torch.cos(x * 2**k)]
    return torch.cat(parts, dim=-1)


def spherical_harmonics(direction: Tensor) -> Tensor:
    """Real spherical harmonics of degree 4 (bands 0 to 3) of unit vectors: (..., 3) -> (..., 16)."""
    x, y, z = direction.unbind(-1)
    xx, yy, zz, xy, yz, xz = x * x, y * y, z * z, x * y, y * z, x * z
    bands = [
        torch.full_like(x, 0.28209479177387814),
        -0.48860251190291987 * y, 0.48860251190291987 * z, -0.48860251190291987 * x,
        1.0925484305920792 * xy, -1.0925484305920792 * yz, 0.31539156525251999 * (3 * zz - 1),
        -1.0925484305920792 * xz, 0.54627421529603959 * (xx - yy),
        0.59004358992664352 * y * (yy - 3 * xx), 2.8906114426405538 * xy * z, 0.45704579946446572 * y * (1 - 5 * zz),
        0.3731763325901154 * z * (5 * zz - 3), 0.45704579946446572 * x * (1 - 5 * zz), 1.4453057213202769 * z * (xx - yy),
        0.59004358992664352 * x * (3 * yy - xx),
    ]  # fmt: skip
    return torch.stack(bands, dim=-1)


def contract(u: Tensor) -> Tensor:
    """Points of all space (..., 3) into the cube of half-side 2: u inside |u|∞ <= 1, else (2 - 1/|u|∞)·u/|u|∞."""
    size = u.abs().amax(dim=-1, keepdim=True)
    safe = size.clamp(min=1.0)
    direction = torch.where(torch.isinf(safe), torch.sign(u) * torch.isinf(u), u / safe)
    return torch.where(size <= 1.0, u, (2.0 - 1.0 / safe) * direction)


def to_unit_cube(u: Tensor) -> Tensor:
    """:func:`contract`, then (u + 2)/4: into [0, 1]^3, where hash grids live."""
    return ((contract(u) + 2.0) / 4.0).clamp(0.0, 1.0)


class _TruncatedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.exp(x.clamp(max=MAX_EXPONENT))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.exp(x.clamp(-MAX_EXPONENT, MAX_EXPONENT))


def truncated_exp(x: Tensor) -> Tensor:
    """exp, clamped at an exponent of 15; the gradient goes on beyond, clamped likewise, so that a saturated density can fall again."""
    result: Tensor = _TruncatedExp.apply(x)
    return result


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """No autocast inside: gates decide in float32."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
