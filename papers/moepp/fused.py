"""The Triton kernels as a differentiable function: forward fused, backward recomputed through torch's grouped products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from papers.moepp.paths import grouped, sorted_loop
from papers.moepp.routing import Experts
from papers.moepp.zero import dense_mix


@torch.library.custom_op("moepp::experts", mutates_args=())
def experts_forward(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_const: Tensor | None,
    v_const: Tensor | None,
    copies: int,
    share: float,
) -> Tensor:
    """Output [T, d] of FFN and zero-computation experts (:func:`papers.moepp.kernels.forward`); opaque to torch.compile."""
    from papers.moepp import kernels

    return kernels.forward(x, ids, gates, w_in, w_out, w_const, v_const, copies, share)


@experts_forward.register_fake
def _(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    w_const: Any,
    v_const: Any,
    copies: int,
    share: float,
) -> Tensor:
    return torch.empty_like(x)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ids: Tensor,
        gates: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        experts: Experts,
        share: float,
        *constants: Tensor,
    ) -> Tensor:
        ctx.experts, ctx.ids = experts, ids
        ctx.save_for_backward(x, gates, w_in, w_out, *constants)
        w_const, v_const = constants or (None, None)
        result: Tensor = experts_forward(x, ids.int(), gates, w_in, w_out, w_const, v_const, experts.copy, share)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            x, gates, w_in, w_out, *constants = inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            run = grouped if x.dtype == torch.bfloat16 else sorted_loop  # torch's product is made for bfloat16
            y = run(x, ctx.ids.long(), gates, w_in, w_out)
            if ctx.experts.zero_computation:
                y = y + dense_mix(x, ctx.ids.long(), gates, ctx.experts, *constants)
            dx, dgates, dw_in, dw_out, *rest = torch.autograd.grad(y, inputs, grads[0], allow_unused=True)
        return dx, None, dgates, dw_in, dw_out, None, None, *rest


def fused(
    x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, experts: Experts, share: float, *pair: Tensor
) -> Tensor:
    """FFN and zero-computation experts in one go; ids: [T, K], an id of N belongs to no expert.

    share: expected share of the assignments at FFN experts; ``pair``: W_c and v, if there are any.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, gates, w_in, w_out, *pair)):
        result: Tensor = _Fused.apply(x, ids, gates, w_in, w_out, experts, share, *pair)
        return result
    w_const, v_const = pair or (None, None)
    output: Tensor = experts_forward(x, ids.int(), gates, w_in, w_out, w_const, v_const, experts.copy, share)
    return output
