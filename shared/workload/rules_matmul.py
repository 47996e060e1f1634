"""Rules of matrix products and convolutions. FLOPs come from ``torch.utils.flop_counter`` where its formulas are right.

Own formulas: grouped products (not in torch's table), products with a vector, and the backward pass of convolutions, where torch's
formula ignores groups in the gradient of the weight. A bias or added matrix costs one vector operation per result element.
Grouped products count every row and every group's weights, as on the meta device the group sizes are not known.
"""

from __future__ import annotations

from math import prod

from torch.utils.flop_counter import flop_registry

from shared.workload.cost import Call, Cost, Rule, register_rule, register_rules, size_bytes


def _from_torch(kind: str, added: str | None, *operands: str) -> Rule:
    """A rule that calls torch's formula on ``operands``; ``added`` is the argument that is added to the product."""

    def rule(call: Call) -> Cost:
        formula = flop_registry[call.func.overloadpacket]
        flops = formula(*(call.arg(name) for name in operands), out_val=call.out)
        bias = added is not None and call.arg(added) is not None and call.arg("beta", 1) != 0
        return Cost(kind, int(flops), call.out.numel() if bias else 0, shape=_shape(call, kind, int(flops)))

    return rule


def _shape(call: Call, kind: str, flops: int) -> tuple[int, ...]:
    """(batch, m, n, k); a convolution is the product that im2col would make of it, one for each group, and tells its pixels."""
    out = call.out
    if flops == 0:
        return ()
    if kind == "matmul":
        return (out.numel() // (out.shape[-2] * out.shape[-1]), *out.shape[-2:], flops // (2 * out.numel()))
    if call.arg("transposed"):
        return ()
    groups, weight = int(call.arg("groups", 1)), call.arg("weight")
    pixels = prod(out.shape[2:])
    return (groups, out.shape[0] * pixels, out.shape[1] // groups, weight.numel() // weight.shape[0], pixels)


register_rule("aten.mm", _from_torch("matmul", None, "self", "mat2"))
register_rule("aten.bmm", _from_torch("matmul", None, "self", "mat2"))
register_rule("aten.addmm", _from_torch("matmul", "self", "self", "mat1", "mat2"))
register_rule("aten.baddbmm", _from_torch("matmul", "self", "self", "batch1", "batch2"))
register_rule("aten._scaled_mm", _from_torch("matmul", "bias", "self", "mat2", "scale_a", "scale_b"))
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed")
register_rules(("convolution", "_convolution", "convolution_overrideable"), _from_torch("conv", "bias", *_CONV))


@register_rule("aten.convolution_backward")
def _convolution_backward(call: Call) -> Cost:
    """Gradients of input and weight each take the products of the forward pass; each operand is read once if it is needed."""
    grad, x, weight = call.arg("grad_output"), call.arg("input"), call.arg("weight")
    positions = x if call.arg("transposed") else grad  # where the kernel is laid
    products = prod(positions.shape[2:]) * x.shape[0] * weight.numel()
    for_input, for_weight, for_bias = call.arg("output_mask")
    read = size_bytes(grad) + for_input * size_bytes(weight) + for_weight * size_bytes(x)
    return Cost("conv", 2 * products * (for_input + for_weight), grad.numel() * for_bias, read)


def _product(*names: str) -> Rule:
    """Product of two operands with one contracted dimension, the last of the first operand; dot products and vectors."""

    def rule(call: Call) -> Cost:
        a, out = call.arg(names[0]), call.out
        added = len(names) > 1
        return Cost("matmul", 2 * out.numel() * a.shape[-1], out.numel() if added else 0)

    return rule


for _name in ("mv", "dot", "vdot", "_int_mm"):
    register_rule(f"aten.{_name}", _product("self"))
register_rule("aten.addmv", _product("mat", "self"))
register_rule("aten._addmm_activation", _product("mat1", "self"))


@register_rule("aten.addbmm")
def _addbmm(call: Call) -> Cost:
    batches, _, inner = call.arg("batch1").shape
    return Cost("matmul", 2 * batches * inner * call.out.numel(), call.out.numel())


def _grouped_mm(call: Call) -> Cost:
    """(T,K)x(G,K,N) by rows, (G,M,K)x(K,T) by columns, (M,T)x(T,N) split along T into G products, (G,M,K)x(G,K,N).

    The shape of a product by rows has groups of equal size.
    """
    a = call.arg("self", call.arg("mat_a"))
    b = call.arg("mat2", call.arg("mat_b"))
    split_inner = a.dim() == 2 and b.dim() == 2
    outer = a.shape[0] * b.shape[-1] if split_inner else call.out.numel()
    by_rows = a.dim() == 2 and b.dim() == 3
    shape = (b.shape[0], -(-a.shape[0] // b.shape[0]), b.shape[-1], a.shape[-1]) if by_rows else ()
    return Cost("matmul", 2 * outer * a.shape[-1], call.out.numel() if call.arg("bias") is not None else 0, shape=shape)


register_rules(("_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2"), _grouped_mm)
