"""Rules of what runs on vector units: elementwise operators, reductions, softmax, normalisation, losses, pooling, optimisers.

The tables give vector operations per element and spell out what is counted where that is not obvious. Operators that PyTorch itself
tags as pointwise cost one operation per result element unless a table says otherwise.
"""

from __future__ import annotations

from math import ceil, prod
from typing import Any

import torch

from shared.workload.cost import (
    Call,
    Cost,
    Rule,
    find_rule,
    operator_name,
    register_fallback,
    register_rules,
    size_bytes,
)
from shared.workload.fused import rms_backward_operations, rms_operations

# Operations per result element. A function unit call (exp, tanh, sigmoid, ...) is one operation.
ELEMENTWISE = {
    "addcmul": 3, "addcdiv": 3, "lerp": 3,
    "clamp": 2, "hardtanh": 2, "relu6": 2, "nan_to_num": 3, "xlogy": 2, "logit": 3, "logaddexp": 4, "hypot": 4,
    "leaky_relu": 2, "_prelu_kernel": 2, "rrelu_with_noise": 2,  # compare, multiply
    "elu": 4, "celu": 5, "selu": 5,  # compare, exp, subtract, multiply (divide or scale)
    "silu": 2, "softplus": 2, "mish": 4, "glu": 2,  # sigmoid and multiply; exp, log1p; softplus, tanh, multiply
    "hardsigmoid": 4, "hardswish": 5,  # add, two bounds, divide (and multiply)
    "log_sigmoid_forward": 4, "softshrink": 3, "hardshrink": 2, "masked_fill": 1, "masked_fill_": 1,
    "_prelu_kernel_backward": 4, "rrelu_with_noise_backward": 1, "leaky_relu_backward": 2, "elu_backward": 4,
    "hardtanh_backward": 2, "hardsigmoid_backward": 3, "hardswish_backward": 6, "softplus_backward": 4,
    "log_sigmoid_backward": 4, "mish_backward": 9, "softshrink_backward": 2, "hardshrink_backward": 2,
    "sigmoid_backward": 3, "tanh_backward": 3,  # g·y·(1 - y); g·(1 - y²)
    "silu_backward": 6,  # s = sigmoid(x); g·s·(1 + x·(1 - s))
    "glu_backward": 3, "native_dropout_backward": 2, "threshold_backward": 1, "logit_backward": 4,
    "native_dropout": 3,  # draw, mask, scale
    "_weight_norm_interface": 3, "_weight_norm_interface_backward": 6,
}  # fmt: skip
GELU = {("gelu", "none"): 5, ("gelu", "tanh"): 9, ("gelu_backward", "none"): 11, ("gelu_backward", "tanh"): 18}
"""x/√2, erf, +1, ·x, ·½; the tanh form needs x³ (2), ·c, +x, ·√(2/π), tanh, +1, ·x, ·½. Backward: cdf 4, pdf 4, three to join."""

# Operations per element of the first operand.
REDUCTIONS = {
    "sum": 1, "nansum": 2, "mean": 1, "prod": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "argmax": 1, "argmin": 1, "aminmax": 2,
    "any": 1, "all": 1, "count_nonzero": 1, "equal": 1, "cumsum": 1, "cumprod": 1, "cummax": 1, "cummin": 1, "_cummax_helper": 1,
    "var": 4, "std": 4, "var_mean": 4, "std_mean": 4,  # mean; subtract, square, accumulate
    "norm": 2, "linalg_vector_norm": 2, "dist": 3, "renorm": 3, "logcumsumexp": 3,
    "logsumexp": 4,  # max, subtract, exp, add
    "_softmax": 5, "_safe_softmax": 5, "_log_softmax": 5,  # max, subtract, exp, add, divide (or subtract the log)
    "_softmax_backward_data": 4, "_log_softmax_backward_data": 4,  # y·(g - Σ g·y); g - exp(y)·Σ g
    "mse_loss": 3, "mse_loss_backward": 3, "l1_loss": 3, "smooth_l1_loss": 6, "smooth_l1_loss_backward": 4, "huber_loss": 6,
    "huber_loss_backward": 4, "binary_cross_entropy": 7, "binary_cross_entropy_backward": 6, "soft_margin_loss": 5,
    "soft_margin_loss_backward": 6, "binary_cross_entropy_with_logits": 8,
}  # fmt: skip

RANDOM = (
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "uniform_", "normal_", "random_", "exponential_",
    "bernoulli_", "bernoulli", "normal", "log_normal_", "cauchy_", "geometric_", "uniform", "trunc_normal_",
)  # fmt: skip

# Parameter update, operations per parameter. AdamW: decay 1, first moment 3, second 4, √ / + 3, update 3; Adam adds decay to the gradient.
PER_PARAMETER = {
    "_fused_adamw_": 14, "_fused_adam_": 15, "_fused_sgd_": 7, "_fused_adagrad_": 8, "_amp_foreach_non_finite_check_and_unscale_": 2,
}  # fmt: skip


def _elementwise(per_element: int) -> Rule:
    return lambda call: Cost("vector", vector_ops=per_element * call.outputs[0].numel())


def _scaled_add(call: Call) -> Cost:
    """x + a·y is a multiplication more than x + y."""
    results = call.arg("self") if "_foreach_" in call.op else call.outputs[:1]
    return Cost("vector", vector_ops=(1 + (call.arg("alpha", 1) != 1)) * sum(tensor.numel() for tensor in results))


def _gelu(call: Call) -> Cost:
    per_element = GELU[call.op.removeprefix("aten.").removesuffix("_"), call.arg("approximate")]
    return Cost("vector", vector_ops=per_element * call.outputs[0].numel())


def _reduction(per_element: int) -> Rule:
    def rule(call: Call) -> Cost:
        source, result = call.inputs[0], call.outputs[0].numel()
        dim = call.arg("dim")
        length = source.shape[dim] if isinstance(dim, int) and source.dim() else source.numel() // max(result, 1)
        return Cost("vector", vector_ops=per_element * source.numel(), shape=_rows(source, length))

    return rule


def _rows(source: torch.Tensor, length: int) -> tuple[int, ...]:
    """(1, rows, 1, length) of an operation along rows of ``source``."""
    return (1, source.numel() // length, 1, length) if length > 0 else ()


def _random(call: Call) -> Cost:
    """A draw per element; what is overwritten is not read."""
    read = call.bytes_in() if call.op in ("aten.bernoulli", "aten.normal") else 0
    return Cost("vector", vector_ops=call.outputs[0].numel(), bytes_read=read)


def _foreach(func: Any) -> Rule | None:
    """``_foreach_add_`` and its like cost what the operator they repeat costs, for all tensors of the list."""
    name = operator_name(func)
    base = name.removeprefix("aten._foreach_").removesuffix("_")
    packet = getattr(torch.ops.aten, base, None)
    if not name.startswith("aten._foreach_") or packet is None:
        return None
    if base in ("add", "sub"):
        return _scaled_add
    if base in REDUCTIONS:
        per_element = REDUCTIONS[base]
    elif base in ELEMENTWISE or _is_pointwise(getattr(packet, packet.overloads()[0])):
        per_element = ELEMENTWISE.get(base, 1)
    else:
        return None

    return lambda call: Cost("vector", vector_ops=per_element * sum(tensor.numel() for tensor in call.arg("self")))


def _is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in getattr(func, "tags", ())


def _pointwise(func: Any) -> Rule | None:
    """One operation per element for what PyTorch tags as pointwise; older versions do not tag the in-place form."""
    name = operator_name(func)
    if _is_pointwise(func):
        return _elementwise(1)
    if name.startswith("aten.") and name.endswith("_") and not name.endswith("__"):
        packet = getattr(torch.ops.aten, name.removeprefix("aten.").removesuffix("_"), None)
        sibling = getattr(packet, getattr(func, "_overloadname", "") or "default", None)
        return find_rule(sibling) if sibling is not None else None
    return None


def _per_parameter(call: Call) -> Cost:
    operations = PER_PARAMETER[call.op.removeprefix("aten.")]
    return Cost("vector", vector_ops=operations * sum(tensor.numel() for tensor in call.arg("self")))


def _normalise(call: Call) -> Cost:
    """Mean 1; subtract, square, add 3; subtract, scale 2; one each for weight and bias. In eval mode batch norm folds to x·a + b, 2."""
    elements = call.inputs[0].numel()
    trains = call.arg("training", True) and "no_training" not in call.op
    affine = sum(call.arg(name) is not None for name in ("weight", "bias"))
    if not trains:  # kernels differ in whether they return the statistics, which nothing needs
        planes = _rows(call.inputs[0], prod(call.inputs[0].shape[2:]))  # each has its own factor and offset
        return Cost("vector", vector_ops=2 * elements, bytes_written=size_bytes(call.outputs[0]), shape=planes)
    written = call.bytes_out()
    # The schema of these two hides that the running statistics are updated.
    if call.op in ("aten.native_batch_norm", "aten.cudnn_batch_norm"):
        written += sum(
            size_bytes(call.arg(name)) for name in ("running_mean", "running_var") if call.arg(name) is not None
        )
    shape = _rows(call.inputs[0], prod(call.arg("normalized_shape", ())) if "layer_norm" in call.op else 0)
    return Cost("vector", vector_ops=elements * (6 + affine), bytes_written=written, shape=shape)


def _rms_norm(call: Call) -> Cost:
    elements = call.arg("input").numel()
    if call.op.endswith("backward"):
        return Cost("vector", vector_ops=rms_backward_operations(elements, *call.arg("output_mask")))
    return Cost("vector", vector_ops=rms_operations(elements, call.arg("weight") is not None))


def _normalise_backward(call: Call) -> Cost:
    """x̂ 2; g·w 1; Σ gw, Σ gw·x̂ 3; dx 4; dw 2 and db 1 where asked for. Batch norm in eval mode: dx is g·a, 1."""
    mask = call.arg("output_mask", (True, True, True))  # cuDNN's has none: it gives all three
    dx = 10 if call.arg("train", True) else 1
    per_element = dx * mask[0] + 2 * mask[1] + mask[2]
    return Cost("vector", vector_ops=per_element * call.arg("input").numel())


def _pool(call: Call) -> Cost:
    window = call.arg("kernel_size")
    size = prod(window) if len(window) > 1 else window[0] ** (2 if "2d" in call.op else 3)
    return Cost("vector", vector_ops=size * call.outputs[0].numel())


def _pool_backward(call: Call) -> Cost:
    """Average pooling adds every gradient to its window, maximum pooling to one place; the input is not read."""
    if "indices" in call.op:
        return Cost("vector", vector_ops=call.arg("grad_output").numel(), bytes_read=call.bytes_in("self"))
    window = call.arg("kernel_size", (1,))
    per_element = prod(window) if len(window) > 1 else window[0] ** (2 if "2d" in call.op else 3)
    return Cost("vector", vector_ops=per_element * call.arg("grad_output").numel(), bytes_read=call.bytes_in("self"))


def _adaptive_pool(call: Call) -> Cost:
    elements = max(call.inputs[0].numel(), call.outputs[0].numel())
    return Cost(
        "vector", vector_ops=elements, bytes_read=call.bytes_in("self") if call.op.endswith("backward") else None
    )


TAPS = {"linear1d": 2, "bilinear2d": 4, "trilinear3d": 8, "bicubic2d": 16}


def _interpolate(call: Call) -> Cost:
    """A weighted sum of the taps for each (forward: result, backward: gradient) element."""
    name = call.op.removeprefix("aten.").removeprefix("upsample_").removesuffix("_backward")
    elements = (call.inputs[0] if call.op.endswith("backward") else call.outputs[0]).numel()
    return Cost("vector", vector_ops=(2 * TAPS[name] - 1) * elements)


def _interpolate_antialiased(call: Call) -> Cost:
    """Two passes, along the width and then along the height; the filter widens with the scale when the image shrinks."""
    source, result = call.inputs[0].shape, call.outputs[0].shape
    if call.op.endswith("backward"):
        source, result = result, source
    maps, (height, width) = prod(result[:2]), result[2:]
    support = 2 if "bicubic" in call.op else 1
    taps_h, taps_w = (2 * ceil(support * max(n / m, 1)) for n, m in zip(source[2:], result[2:], strict=True))
    passes = source[2] * width * (2 * taps_w - 1) + height * width * (2 * taps_h - 1)
    return Cost("vector", vector_ops=maps * passes)


for _name, _ops in ELEMENTWISE.items():
    register_rules([_name], _elementwise(_ops))
for _name, _ops in REDUCTIONS.items():
    register_rules([_name], _reduction(_ops))
register_rules(["add", "sub", "rsub"], _scaled_add)
register_rules(["max.other", "min.other"], _elementwise(1))
register_rules(["gelu", "gelu_backward"], _gelu)
register_rules(RANDOM, _random)
register_rules(PER_PARAMETER, _per_parameter)
register_rules(
    ["native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
     "_batch_norm_with_update", "_batch_norm_no_update", "cudnn_batch_norm", "_native_batch_norm_legit_functional"], _normalise,
)  # fmt: skip
register_rules(["_fused_rms_norm", "_fused_rms_norm_backward"], _rms_norm)
register_rules(
    ["native_layer_norm_backward", "native_group_norm_backward", "native_batch_norm_backward", "batch_norm_backward",
     "cudnn_batch_norm_backward"], _normalise_backward,
)  # fmt: skip
register_rules(["max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"], _pool)
register_rules([f"{pool}_backward" for pool in ("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d")],
               _pool_backward)  # fmt: skip
register_rules(
    [f"{pool}{way}" for pool in ("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d")
     for way in ("", "_backward")], _adaptive_pool,
)  # fmt: skip
register_rules([f"upsample_{name}{way}" for name in TAPS for way in ("", "_backward")], _interpolate)
register_rules(
    [f"_upsample_{name}_aa{way}" for name in ("bilinear2d", "bicubic2d") for way in ("", "_backward")],
    _interpolate_antialiased,
)
register_fallback(_foreach)
register_fallback(_pointwise)
