"""Shift-only normalisation fused with an activation whose derivative is a step (Sec. 3): forward, backward, one bit kept per element.

:func:`shift_act` computes u = γ (x - μ) / sqrt(σ² + eps) + β with frozen γ, μ, σ² and then y = act(u). Its backward pass is
dx = a · m · dy and dβ = Σ m · dy with a = γ / sqrt(σ² + eps) and m = 1[u >= 0], so all that is kept is m, packed eight to a byte, and
the vector a. Three paths give the same function: NumPy's vectorised bit packing for float32 on CPU, Triton on CUDA
(:mod:`papers.mobiletl.kernels`, which recomputes a), and plain torch operators elsewhere (float64, meta, other devices).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import unknown

STEP_ACTIVATIONS = ("relu", "relu6", "hard_swish", "silu")
"""Activations that resemble 0 below zero and x above it, so that 1[x >= 0] stands in for their derivative."""

_FLOATS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)

TWO_VALUED = ("relu", "relu6")  # their exact derivative is 0 or 1


def activate(x: Tensor, activation: str, *, inplace: bool = False) -> Tensor:
    """An activation by name. Raises UserError for a name that is not in :data:`STEP_ACTIVATIONS`."""
    if activation == "relu":
        return F.relu(x, inplace=inplace)
    if activation == "relu6":
        return F.relu6(x, inplace=inplace)
    if activation == "hard_swish":
        return F.hardswish(x, inplace=inplace)
    if activation == "silu":
        return F.silu(x, inplace=inplace)
    raise unknown("activation", activation, STEP_ACTIVATIONS)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack N booleans, in memory order, into ceil(N / 8) bytes: element 8 i + j becomes bit j of byte i."""
    flat = _in_memory_order(bits).reshape(-1)
    if flat.device.type == "cpu":
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    groups = F.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    shifted = torch.bitwise_left_shift(groups, torch.arange(8, dtype=torch.uint8, device=flat.device))
    return shifted.sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, like: Tensor) -> Tensor:
    """The booleans that :func:`pack_bits` packed, in the shape and memory layout of the dense tensor ``like``."""
    n = like.numel()
    if packed.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(packed.numpy(), count=n, bitorder="little").view(np.bool_))
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
        flat = torch.bitwise_right_shift(packed.unsqueeze(1), shifts).bitwise_and(1).view(-1)[:n].to(torch.bool)
    ordered = _in_memory_order(like)
    shaped = flat.view(ordered.shape)
    return shaped if ordered is like else shaped.permute(0, 3, 1, 2)


def shift_act(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, activation: str
) -> Tensor:  # fmt: skip
    """act(weight · (x - mean) / sqrt(var + eps) + bias) with a step for the activation's derivative.

    Args:
        x: (N, C, H, W), contiguous or channels-last; other layouts are copied.
        weight, mean, var: (C,), constants of the layer: they get no gradient.
        bias: (C,), the trained shift β.
        activation: one of :data:`STEP_ACTIVATIONS`.

    Returns: a tensor like ``x``. Raises UserError for an unknown activation.
    """
    if activation not in STEP_ACTIVATIONS:
        raise unknown("activation", activation, STEP_ACTIVATIONS)
    if not torch.is_grad_enabled():
        return activate(F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps), activation, inplace=True)
    if not _is_dense(x):
        x = x.contiguous()
    out: Tensor = _ShiftAct.apply(x, weight, bias, mean, var, eps, activation)
    return out


def step_forward(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, activation: str, *, overwrite: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """:func:`shift_act` outside autograd: the result, and the tensors that :func:`step_backward` needs.

    ``overwrite`` allows the result to take the memory of ``x``, which must be dense.
    """
    if _fits_triton(x):
        from papers.mobiletl import kernels

        return kernels.step_forward(x, weight, bias, mean, var, eps, activation, overwrite=overwrite)
    if overwrite and _numpy_is_faster(x):  # in place: fresh memory costs as much as the arithmetic
        unused = x.new_empty(0)
        u = torch.ops.aten.native_batch_norm.out(
            x, weight, bias, mean, var, False, 0.0, eps, out=x, save_mean=unused, save_invstd=unused
        )[0]
    else:
        u = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
    if _numpy_is_faster(u):
        packed = torch.from_numpy(np.packbits(_in_memory_order(u).detach().numpy().reshape(-1) >= 0, bitorder="little"))
    else:
        packed = pack_bits(u >= 0)
    return activate(u, activation, inplace=True), (weight * torch.rsqrt(var + eps), packed)


def step_backward(
    grad: Tensor, kept: tuple[Tensor, ...], eps: float, *, channels_last: bool, input_grad: bool = True, bias_grad: bool = True,
    overwrite: bool = False, gate: Tensor | None = None, mean_grad: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of the input and of the shift, from the gradient of the result and what :func:`step_forward` kept.

    Args:
        channels_last: the memory layout of the forward pass.
        overwrite: the gradient of the input may take the memory of ``grad``.
        gate, mean_grad: (N, C), of a squeeze-and-excitation that read the result: ``grad`` is then the gradient of the gated map, and
            the gradient of the result is grad · gate + mean_grad / (H W).
    """
    grad = grad.contiguous(memory_format=_format(channels_last))
    if _fits_triton(grad):
        from papers.mobiletl import kernels

        return kernels.step_backward(
            grad, kept, eps, channels_last=channels_last, input_grad=input_grad, bias_grad=bias_grad, overwrite=overwrite,
            gate=gate, mean_grad=mean_grad,
        )  # fmt: skip
    scale, packed = kept
    if gate is not None and mean_grad is not None:
        plane = grad.shape[2] * grad.shape[3]
        grad = torch.addcmul((mean_grad / plane)[:, :, None, None], grad, gate[:, :, None, None])
        overwrite = True
    if _numpy_is_faster(grad):
        ordered = _in_memory_order(grad)
        mask = (
            torch.from_numpy(_FLOATS_OF_BYTE.take(packed.numpy(), axis=0)).view(-1)[: grad.numel()].view(ordered.shape)
        )
        through = torch.mul(ordered, mask, out=ordered if overwrite else mask)
        through = through if ordered is grad else through.permute(0, 3, 1, 2)
    else:
        through = grad * unpack_bits(packed, grad)
    grad_bias = through.sum((0, 2, 3), dtype=scale.dtype) if bias_grad else None
    return through.mul_(scale.view(1, -1, 1, 1)) if input_grad else None, grad_bias


def gate_backward(grad: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Gradient (N, C) before a hard sigmoid whose result ``gate`` multiplied the map ``y``, from the gradient of the product."""
    grad = grad.contiguous(memory_format=_format(not y.is_contiguous()))
    if _fits_triton(y):
        from papers.mobiletl import kernels

        return kernels.gate_backward(grad, y, gate)
    inner = torch.einsum("nchw,nchw->nc", grad, y)
    return inner * ((gate > 0) & (gate < 1)) / 6


class _ShiftAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, activation: str
    ) -> Tensor:
        y, kept = step_forward(x, weight, bias, mean, var, eps, activation)
        ctx.channels_last, ctx.eps = not y.is_contiguous(), eps
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_bias = step_backward(
            grad, ctx.saved_tensors, ctx.eps, channels_last=ctx.channels_last, input_grad=ctx.needs_input_grad[0],
            bias_grad=ctx.needs_input_grad[2],
        )  # fmt: skip
        return grad_x, None, grad_bias, None, None, None, None


class _PackedAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, step: bool) -> Tensor:
        ctx.channels_last = x.dim() == 4 and not x.is_contiguous()
        if step:
            bits = x >= 0
        else:
            bits = (x > 0) & (x < 6) if activation == "relu6" else x > 0
        ctx.save_for_backward(pack_bits(bits))
        return activate(x, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = grad.contiguous(memory_format=_format(ctx.channels_last))
        return grad * unpack_bits(ctx.saved_tensors[0], grad), None, None


def packed_act(x: Tensor, activation: str, *, step: bool) -> Tensor:
    """An activation that keeps one bit per element: the step 1[x >= 0], or the exact derivative of ReLU and ReLU6.

    Raises UserError for an activation whose exact derivative takes more than two values.
    """
    if not step and activation not in TWO_VALUED:
        raise unknown("activation with a two-valued derivative", activation, TWO_VALUED)
    out: Tensor = _PackedAct.apply(x, activation, step)
    return out


def derivative_levels(bits: int) -> tuple[float, ...]:
    """Hard-Swish's derivative in 2**bits levels: its mean over each of as many equal intervals of [-3, 3]; one bit gives the step.

    A constant that stands in for a function in least squares is its mean, here (h(b) - h(a)) / (b - a). Raises UserError for a number
    of bits that does not fill bytes.
    """
    if bits not in (1, 2, 4):
        raise unknown("number of bits of a derivative", str(bits), ("1", "2", "4"))
    edges = torch.linspace(-3, 3, 2**bits + 1, dtype=torch.float64)
    values = F.hardswish(edges)
    return tuple(((values[1:] - values[:-1]) / (edges[1:] - edges[:-1])).tolist())


def derivative_codes(u: Tensor, bits: int) -> Tensor:
    """Which level of :func:`derivative_levels` each element of ``u`` has, as uint8; the outer intervals reach to infinity."""
    scale = 2**bits / 6
    return ((u + 3) * scale).floor_().clamp_(0, 2**bits - 1).to(torch.uint8)


class _CodedAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        ctx.channels_last, ctx.bits = x.dim() == 4 and not x.is_contiguous(), bits
        flat = _in_memory_order(derivative_codes(x, bits)).reshape(-1)
        per_byte = 8 // bits
        groups = F.pad(flat, (0, -flat.numel() % per_byte)).view(-1, per_byte)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=x.device)
        ctx.save_for_backward(torch.bitwise_left_shift(groups, shifts).sum(1, dtype=torch.uint8))
        return F.hardswish(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous(memory_format=_format(ctx.channels_last))
        (packed,) = ctx.saved_tensors
        shifts = torch.arange(0, 8, ctx.bits, dtype=torch.uint8, device=grad.device)
        codes = torch.bitwise_right_shift(packed.unsqueeze(1), shifts).bitwise_and(2**ctx.bits - 1)
        ordered = _in_memory_order(grad)
        levels = torch.tensor(derivative_levels(ctx.bits), dtype=grad.dtype, device=grad.device)
        through = ordered * levels[codes.view(-1)[: grad.numel()].long()].view(ordered.shape)
        return through if ordered is grad else through.permute(0, 3, 1, 2), None


def coded_hard_swish(x: Tensor, bits: int) -> Tensor:
    """Hard-Swish whose derivative is kept in ``bits`` bits per element (1, 2 or 4), by :func:`derivative_levels`."""
    derivative_levels(bits)
    out: Tensor = _CodedAct.apply(x, bits)
    return out


class _HardSigmoid(torch.autograd.Function):
    """Keeps its result, which the product with the map keeps anyway, where torch keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.hardsigmoid(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grad * ((y > 0) & (y < 1)) / 6


def hard_sigmoid(x: Tensor) -> Tensor:
    """``F.hardsigmoid`` with its exact derivative, which depends on the result alone: 1/6 where it lies between 0 and 1."""
    out: Tensor = _HardSigmoid.apply(x)
    return out


class _NormOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(weight * torch.rsqrt(var + eps))
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        grad_bias = grad.sum((0, 2, 3), dtype=scale.dtype) if ctx.needs_input_grad[2] else None
        grad_x = grad * scale.to(grad.dtype).view(1, -1, 1, 1) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad_bias, None, None, None


def shift_norm(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The normalisation of :func:`shift_act` alone: keeps the vector a, where ``F.batch_norm`` keeps its whole input."""
    out: Tensor = _NormOnly.apply(x, weight, bias, mean, var, eps)
    return out


def _fits_triton(x: Tensor) -> bool:
    """The kernels compute in float32 and index with 32 bits."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() < 2**31


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _in_memory_order(x: Tensor) -> Tensor:
    """A view of a contiguous or channels-last tensor whose dimensions follow its elements in memory."""
    return x if x.is_contiguous() else x.permute(0, 2, 3, 1)


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _numpy_is_faster(x: Tensor) -> bool:
    """On CPU torch's comparison and its product with booleans are not vectorised; NumPy's are."""
    return x.device.type == "cpu" and x.dtype == torch.float32
