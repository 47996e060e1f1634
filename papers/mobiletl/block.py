"""A MobileTL inverted residual block as one node of the graph (Sec. 3.4): the layers' arithmetic with fewer launches and temporaries.

Layer by layer a block is a dozen modules and as many nodes of the graph; on a GPU at small batches, launching them takes longer than
running them. Here forward and backward call the operators directly, results overwrite what nothing needs any more, and on CUDA the
backward pass through the squeeze-and-excitation shares a kernel with the norm's. What is kept is what the accounting says. With
``recompute`` the expanded maps are computed again in the backward pass, which frozen statistics make exact.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models._efficientnet_blocks import InvertedResidual, SqueezeExcite
from torch import Tensor, nn

from papers.mobiletl.functional import gate_backward, step_backward, step_forward
from papers.mobiletl.layers import Adapted, HardSigmoid, RecomputingInvertedResidual, ShiftNormAct, activation_name

_MASK = [True, True, False]  # gradients of a convolution's input and weight; it has no bias


class FusedInvertedResidual(Adapted, InvertedResidual):
    """timm's block with MobileTL's internal norms; while it trains, it runs as a single function and its layers' hooks are not called."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        out: Tensor = _run(self, x, recompute=False) if _is_training(x) else super().forward(x)
        return out


class FusedRecomputingInvertedResidual(RecomputingInvertedResidual):
    """The same, keeping the block's input and the last norm's input alone."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return _run(self, x, recompute=True) if _is_training(x) else super().forward(x)


def can_fuse(block: nn.Module) -> bool:
    """Whether a converted block is one that :class:`FusedInvertedResidual` computes: anything else runs layer by layer."""
    if (
        type(block) is not InvertedResidual
        or not isinstance(block.bn3, nn.BatchNorm2d)
        or not block.bn3.track_running_stats
    ):
        return False
    plain = (block.aa, block.drop_path, block.bn3.act, block.bn3.drop)
    convolutions = (block.conv_pw, block.conv_dw, block.conv_pwl)
    norms = (block.bn1, block.bn2)
    return (
        all(isinstance(layer, nn.Identity) for layer in plain)
        and all(type(c) is nn.Conv2d and c.bias is None and not isinstance(c.padding, str) for c in convolutions)
        and all(isinstance(norm, ShiftNormAct) and norm.act_backward == "step" for norm in norms)
        and (isinstance(block.se, nn.Identity) or _is_plain_squeeze(block.se))
    )


def _is_plain_squeeze(se: nn.Module) -> bool:
    return type(se) is SqueezeExcite and activation_name(se.act1) == "relu" and isinstance(se.gate, HardSigmoid)


def _is_training(x: Tensor) -> bool:
    return torch.is_grad_enabled() and not (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))


def _run(block: InvertedResidual, x: Tensor, *, recompute: bool) -> Tensor:
    last = block.bn3
    momentum = last.momentum
    if last.training:
        last.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(last.num_batches_tracked)
    squeeze: tuple[Tensor, ...] = ()
    if not isinstance(block.se, nn.Identity):
        reduce, expand = block.se.conv_reduce, block.se.conv_expand
        squeeze = (reduce.weight, reduce.bias, expand.weight, expand.bias)
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        x = x.contiguous()
    out: Tensor = _Block.apply(
        block, recompute, momentum or 0.0, x, block.conv_pw.weight, block.bn1.bias, block.conv_dw.weight, block.bn2.bias,
        block.conv_pwl.weight, last.weight, last.bias, *squeeze,
    )  # fmt: skip
    return out


def _convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    return torch.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]


def _convolve_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    found = torch.ops.aten.convolution_backward(
        grad, x, weight, None, conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups, mask
    )
    return found[0], found[1]


def _normalise(norm: ShiftNormAct, x: Tensor, bias: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    return step_forward(
        x, norm.weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.activation, overwrite=True
    )


def _expanded(
    block: InvertedResidual, x: Tensor, weights: tuple[Tensor, ...]
) -> tuple[list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
    """From the block's input to the projection's: the maps and vectors that the backward pass reads, and what the two norms keep."""
    w1, b1, w2, b2, *squeeze = weights
    y1, kept1 = _normalise(block.bn1, _convolve(block.conv_pw, x, w1), b1)
    y2, kept2 = _normalise(block.bn2, _convolve(block.conv_dw, y1, w2), b2)
    if not squeeze:
        return [y1, y2], kept1, kept2
    reduce, reduce_bias, expand, expand_bias = squeeze
    mean = y2.mean((2, 3))
    hidden = torch.addmm(reduce_bias, mean, reduce.flatten(1).t()).relu_()
    gate = torch.nn.functional.hardsigmoid(torch.addmm(expand_bias, hidden, expand.flatten(1).t()), inplace=True)
    return [y1, y2, mean, hidden, gate, y2 * gate[:, :, None, None]], kept1, kept2


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: InvertedResidual, recompute: bool, momentum: float, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        w3: Tensor, scale: Tensor, shift: Tensor, *squeeze: Tensor,
    ) -> Tensor:  # fmt: skip
        maps, kept1, kept2 = _expanded(block, x, (w1, b1, w2, b2, *squeeze))
        z3 = _convolve(block.conv_pwl, maps[-1], w3)
        last = block.bn3
        out, mean, inverse = torch.native_batch_norm(
            z3, scale, shift, last.running_mean, last.running_var, last.training, momentum, last.eps
        )
        if block.has_skip:
            out.add_(x)
        # In training mode the running statistics change with every call and the backward pass does not read them.
        running = () if last.training else (last.running_mean, last.running_var)
        ctx.block, ctx.recompute, ctx.is_training = block, recompute, last.training
        ctx.sizes = (len(squeeze), len(running), 0 if recompute else len(maps), 0 if recompute else len(kept1))
        intermediate = () if recompute else (*maps, *kept1, *kept2)
        ctx.save_for_backward(
            x, w1, b1, w2, b2, w3, scale, z3, mean, inverse, *squeeze, *running, *intermediate
        )  # fmt: skip
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: InvertedResidual = ctx.block
        x, w1, b1, w2, b2, w3, scale, z3, mean, inverse, *rest = ctx.saved_tensors
        squeezes, runs, n_maps, n_kept = ctx.sizes
        squeeze, running, rest = rest[:squeezes], rest[squeezes : squeezes + runs], rest[squeezes + runs :]
        if ctx.recompute:
            maps, kept1, kept2 = _expanded(block, x, (w1, b1, w2, b2, *squeeze))
        else:
            maps, kept1, kept2 = rest[:n_maps], tuple(rest[n_maps : n_maps + n_kept]), tuple(rest[n_maps + n_kept :])
        needs_x = ctx.needs_input_grad[3]
        running_mean, running_var = running or (None, None)
        grad = grad.contiguous(memory_format=_layout(z3))
        dz3, dscale, dshift = torch.ops.aten.native_batch_norm_backward(
            grad,
            z3,
            scale,
            running_mean,
            running_var,
            mean,
            inverse,
            ctx.is_training,
            block.bn3.eps,
            [True, True, True],
        )
        y1, y2 = maps[:2]
        dy, dw3 = _convolve_backward(block.conv_pwl, dz3, maps[-1], w3, _MASK)
        del dz3
        assert dy is not None
        gates: dict[str, Tensor] = {}
        squeeze_grads: tuple[Tensor, ...] = ()
        if squeeze:
            gates["gate"] = maps[4]
            gates["mean_grad"], squeeze_grads = _squeeze_backward(dy, y2, maps[2], maps[3], maps[4], squeeze)
        dz2, db2 = step_backward(dy, kept2, block.bn2.eps, channels_last=_is_last(y2), overwrite=True, **gates)
        del dy
        assert dz2 is not None
        dy1, dw2 = _convolve_backward(block.conv_dw, dz2, y1, w2, _MASK)
        del dz2
        assert dy1 is not None
        dz1, db1 = step_backward(dy1, kept1, block.bn1.eps, channels_last=_is_last(y1), overwrite=True)
        del dy1
        assert dz1 is not None
        dx, dw1 = _convolve_backward(block.conv_pw, dz1, x, w1, [needs_x, True, False])
        if dx is not None and block.has_skip:
            dx.add_(grad)
        return None, None, None, dx, dw1, db1, dw2, db2, dw3, dscale, dshift, *squeeze_grads


def _squeeze_backward(
    grad: Tensor, y: Tensor, mean: Tensor, hidden: Tensor, gate: Tensor, weights: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Gradient of the squeezed vector, which its mean spreads over the map, and of the four parameters."""
    reduce, _, expand, _ = weights
    dgate = gate_backward(grad, y, gate)
    dexpand = (dgate.t() @ hidden).view_as(expand)
    dhidden = torch.ops.aten.threshold_backward(dgate @ expand.flatten(1), hidden, 0)
    dreduce = (dhidden.t() @ mean).view_as(reduce)
    return dhidden @ reduce.flatten(1), (dreduce, dhidden.sum(0), dexpand, dgate.sum(0))


def _is_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_last(x) else torch.contiguous_format
