"""Scaled dot-product attention as one fused operator, on every device.

``F.scaled_dot_product_attention`` splits into matrix products on the meta device and picks a kernel by device elsewhere. The trace
catches the call itself and books one row forward and one row backward, as a fused kernel (FlashAttention, Dao et al. 2022) executes
them: the N x N scores never reach memory, the backward pass recomputes them, and autograd keeps q, k, v, the mask, the output and the
log-sum-exp of each row in fp32. A causal or masked product is counted dense, as the field does. Grouped-query attention counts the
query heads' products and the bytes of the fewer key and value heads. The numbers computed are PyTorch's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from shared.workload.cost import Call, Cost, FullCost, register_rules, size_bytes
from shared.workload.fused import Recorder, gradients

FORWARD = "aten.scaled_dot_product_attention"
BACKWARD = "aten.scaled_dot_product_attention_backward"


def _products(query: torch.Tensor, key: torch.Tensor, out: torch.Tensor) -> tuple[int, int, int]:
    """Number of scores, and MACs of a product with d_qk and with d_v."""
    scores = out.numel() // max(out.shape[-1], 1) * key.shape[-2]
    return scores, scores * query.shape[-1], scores * out.shape[-1]


def forward_cost(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, out: torch.Tensor,
    logsumexp: torch.Tensor | None, dropout_p: float = 0.0,
) -> FullCost:  # fmt: skip
    """q·kᵀ and p·v; per score a scaling, five operations of softmax, one for a mask and three for dropout."""
    scores, qk, pv = _products(query, key, out)
    per_score = 6 + (mask is not None) + 3 * (dropout_p > 0)
    read = sum(size_bytes(t) for t in (query, key, value, mask) if t is not None)
    written = sum(size_bytes(t) for t in (out, logsumexp) if t is not None)
    batch = scores // max(query.shape[-2] * key.shape[-2], 1)
    shape = (batch, query.shape[-2], key.shape[-2], query.shape[-1])
    return FullCost("attention", 2 * (qk + pv), per_score * scores, read, written, shape)


def backward_cost(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, out: torch.Tensor,
    logsumexp: torch.Tensor, dropout_p: float = 0.0, mask_grad: bool = False,
) -> FullCost:  # fmt: skip
    """q·kᵀ again, dv, dp, dq and dk; per score: scale, subtract the log-sum-exp, exp, dp - δ, times p, scale; δ takes two per output."""
    scores, qk, pv = _products(query, key, out)
    per_score = 6 + (mask is not None) + mask_grad + 3 * (dropout_p > 0)
    read = sum(size_bytes(t) for t in (query, key, value, mask, out, logsumexp) if t is not None)
    read += out.numel() * out.element_size()  # gradient of the output
    results = (query, key, value, mask) if mask_grad else (query, key, value)
    written = sum(t.numel() * t.element_size() for t in results if t is not None)
    return FullCost("attention", 2 * (3 * qk + 2 * pv), per_score * scores + 2 * out.numel(), read, written)


@dataclass(frozen=True)
class _Options:
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    seed: int  # of the dropout mask, which the backward pass draws again
    trains: bool  # a graph is recorded

    def run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        devices = [query.device] if query.is_cuda else []
        with torch.random.fork_rng(devices, enabled=self.dropout_p > 0):
            if self.dropout_p > 0 and query.is_cuda:
                torch.cuda.manual_seed(self.seed)
            elif self.dropout_p > 0:
                torch.default_generator.manual_seed(self.seed)
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, dropout_p=self.dropout_p, is_causal=self.is_causal, scale=self.scale,
                enable_gqa=self.enable_gqa,
            )  # fmt: skip


class _FusedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recorder: Recorder, options: _Options, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        with recorder.paused():
            out = options.run(query, key, value, mask)
            if out.dim() == 4:  # fused kernels lay heads inside tokens: merging the heads afterwards is a view
                out = out.transpose(1, 2).contiguous().transpose(1, 2)
            # Of the right size; its values are not used, as the backward pass recomputes.
            logsumexp = query.new_empty(out.shape[:-1], dtype=torch.float32) if options.trains else None
        if options.trains:
            ctx.save_for_backward(query, key, value, mask, out, logsumexp)
            ctx.recorder, ctx.options = recorder, options
        cost = forward_cost(query, key, value, mask, out, logsumexp, options.dropout_p)
        recorder.record(FORWARD, query.dtype, cost)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, mask, out, logsumexp = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        with ctx.recorder.paused():
            found = gradients(ctx.options.run, (query, key, value, mask), wanted, grad)
        cost = backward_cost(query, key, value, mask, out, logsumexp, ctx.options.dropout_p, mask_grad=wanted[3])
        ctx.recorder.record(BACKWARD, query.dtype, cost)
        return None, None, *found


def fused_attention(
    recorder: Recorder, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Takes the place of ``F.scaled_dot_product_attention`` (same arguments) during a trace."""
    device = query.device.type
    # Autocast casts before the kernel, so the casts are booked.
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        lower = torch.get_autocast_dtype(device)
        query, key, value = (t if t.dtype is torch.float64 else t.to(lower) for t in (query, key, value))
    with recorder.paused():
        seed = int(torch.randint(2**31, (), device="cpu")) if dropout_p > 0 else 0
    trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value, attn_mask) if t is not None)
    options = _Options(dropout_p, is_causal, scale, enable_gqa, seed, trains)
    out: torch.Tensor = _FusedAttention.apply(recorder, options, query, key, value, attn_mask)
    return out


_KERNELS = tuple(
    f"_scaled_dot_product_{kernel}"
    for kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu", "fused_attention_overrideable")
)  # fmt: skip


def _kernel(call: Call) -> Cost:
    """A fused kernel that was called by its own name."""
    query, key, value = (call.arg(name) for name in ("query", "key", "value"))
    mask = call.arg("attn_bias", call.arg("attn_mask"))
    return Cost(**vars(forward_cost(query, key, value, mask, call.out[0], call.out[1], call.arg("dropout_p", 0.0))))


def _kernel_backward(call: Call) -> Cost:
    query, key, value = (call.arg(name) for name in ("query", "key", "value"))
    mask = call.arg("attn_bias", call.arg("attn_mask"))
    out, logsumexp = call.arg("out"), call.arg("logsumexp")
    return Cost(**vars(backward_cost(query, key, value, mask, out, logsumexp, call.arg("dropout_p", 0.0))))


register_rules(_KERNELS, _kernel)
register_rules((f"{kernel}_backward" for kernel in _KERNELS), _kernel_backward)
