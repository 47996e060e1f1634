"""Kernels that PyTorch runs as one on some devices and in pieces on others: the trace books them as one on all.

The call itself is caught above autograd. One row is booked forward and one backward; the numbers computed are PyTorch's own, whatever
it runs inside. RMS norm is here (one kernel on CUDA, six operators on CPU and meta), attention in :mod:`shared.workload.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import rms_norm

from shared.workload.cost import FullCost, size_bytes

RMS_FORWARD, RMS_BACKWARD = "aten._fused_rms_norm", "aten._fused_rms_norm_backward"


@dataclass(frozen=True)
class Recorder:
    """What a fused kernel needs of the trace: book a row, and run operators without booking them."""

    record: Callable[[str, torch.dtype, FullCost], None]
    paused: Callable[[], AbstractContextManager[None]]


def gradients(
    run: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor | None], wanted: Sequence[bool], grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of ``run(*tensors)`` for the ``wanted`` ones, by running it again."""
    with torch.enable_grad():
        leaves = [t if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)]
        out = run(*leaves)
        asked = [t for t, need in zip(leaves, wanted, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(out, asked, grad))
    return tuple(next(found) if need else None for need in wanted)


def rms_operations(elements: int, weighted: bool) -> int:
    """Vector operations: square, add, scale; one more with a weight."""
    return elements * (3 + weighted)


def rms_backward_operations(elements: int, for_input: bool, for_weight: bool) -> int:
    """Vector operations: x̂ 1, g·w 1, Σ gw·x̂ 2, dx 3; dw 2."""
    return elements * (7 * for_input + 2 * for_weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, run: Callable[..., torch.Tensor], rows: int, x: torch.Tensor, weight: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        with recorder.paused():
            out = run(x, weight)
            rstd = x.new_empty(rows, dtype=torch.float32)  # of the right size, values unused
        ctx.save_for_backward(x, weight, rstd)
        ctx.recorder, ctx.run = recorder, run
        read = size_bytes(x) + (size_bytes(weight) if weight is not None else 0)
        operations = rms_operations(x.numel(), weight is not None)
        cost = FullCost("vector", 0, operations, read, size_bytes(out) + size_bytes(rstd))
        recorder.record(RMS_FORWARD, x.dtype, cost)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        with ctx.recorder.paused():
            found = gradients(ctx.run, (x, weight), wanted, grad)
        read = sum(size_bytes(t) for t in (grad, x, weight, rstd) if t is not None)
        written = sum(size_bytes(t) for t in found if t is not None)
        cost = FullCost("vector", 0, rms_backward_operations(x.numel(), *wanted), read, written)
        ctx.recorder.record(RMS_BACKWARD, x.dtype, cost)
        return None, None, None, *found


def fused_rms_norm(
    recorder: Recorder, input: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Takes the place of ``torch.rms_norm`` (same arguments) during a trace."""
    shape = list(normalized_shape)
    if (
        weight is not None and weight.dtype is not input.dtype
    ):  # no kernel takes two types: it runs in pieces everywhere
        return rms_norm(input, shape, weight, eps)
    rows = input.numel() // max(prod(shape), 1)
    out: torch.Tensor = _RMSNorm.apply(recorder, lambda x, w: rms_norm(x, shape, w, eps), rows, input, weight)
    return out
