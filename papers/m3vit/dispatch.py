"""Moving tokens to their experts and back, and the products in between: the machinery of the reordered MoE layer (Sec. 3.2).

Token-expert pairs are sorted by expert. The experts then work on rows, one queue after the other; how the rows are laid out and
multiplied depends on the device (:func:`lay_out`). Shape letters: S tokens, K experts per token, N experts, M >= S·K rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


class Queues(NamedTuple):
    """Token-expert pairs (numbered token·K + slot) sorted by expert."""

    order: Tensor  # (S·K,) pair at each sorted place
    place: Tensor  # (S·K,) sorted place of each pair
    expert: Tensor  # (S·K,) expert at each sorted place
    ends: Tensor  # (N,) int32, end of each expert's queue

    def tokens(self, top_k: int) -> Tensor:
        """Token at each sorted place."""
        return self.order.div(top_k, rounding_mode="floor")


def sort_by_expert(index: Tensor, num_experts: int) -> Queues:
    """Queues of the choice ``index`` (S, K); within a queue, tokens keep their order."""
    flat = index.flatten()
    if index.device.type == "cpu":  # NumPy's radix sort of small integers is 15 times faster than torch.argsort
        small = np.uint8 if num_experts <= 256 else np.uint16 if num_experts <= 65536 else np.int64
        order = torch.from_numpy(np.argsort(flat.numpy().astype(small), kind="stable"))
    else:
        order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(flat), device=index.device))
    expert = flat.index_select(0, order)
    ends = torch.searchsorted(expert, torch.arange(num_experts, device=index.device), right=True, out_int32=True)
    return Queues(order, place, expert, ends)


Weights = tuple[Tensor, Tensor, Tensor, Tensor]  # W1 (N, h, D), b1 (N, h), W2 (N, D, h), b2 (N, D) of the experts
Linear = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows (M, in), weight (N, out, in), bias (N, out) -> rows (M, out)


class Rows(NamedTuple):
    """The rows on which the experts work."""

    tokens: Tensor  # (M,) token in each row
    place: Tensor  # (S, K) row of each token-expert pair
    mlp: Callable[[Tensor, Weights], Tensor]  # tokens (S, D) -> their expert's output in each row (M, D)


def _rows(tokens: Tensor, place: Tensor, linear: Linear) -> Rows:
    """Rows whose MLP is two layers of ``linear``."""

    def mlp(x: Tensor, weights: Weights) -> Tensor:
        weight1, bias1, weight2, bias2 = weights
        return linear(F.gelu(linear(_Dispatch.apply(x, tokens, place), weight1, bias1)), weight2, bias2)

    return Rows(tokens, place, mlp)


def lay_out(index: Tensor, num_experts: int, x: Tensor) -> Rows:
    """Rows for the choice ``index`` (S, K), in the form that is fastest on the device and in the precision of ``x``."""
    return layout_for(x)(index, num_experts)


def layout_for(x: Tensor) -> Callable[[Tensor, int], Rows]:
    """One of the layouts below. On CUDA none of them waits for the queue lengths, so they can be captured as a graph."""
    if x.device.type == "meta":
        return balanced_rows
    if x.device.type == "cuda":
        return grouped_rows if x.dtype in (torch.bfloat16, torch.float16) else blocked_rows
    return looped_rows


def looped_rows(index: Tensor, num_experts: int) -> Rows:
    """Queue after queue, nothing padded: for CPUs, where a call costs little.

    Without gradients, both layers run while a queue is in the cache.
    """
    queues = sort_by_expert(index, num_experts)
    tokens, place = queues.tokens(index.shape[-1]), queues.place.view_as(index)
    counts: list[int] = queues.ends.diff(prepend=queues.ends.new_zeros(1)).tolist()
    if torch.is_grad_enabled():
        return _rows(tokens, place, lambda x, weight, bias: _QueuedLinear.apply(x, weight, bias, counts))

    def mlp(x: Tensor, weights: Weights) -> Tensor:
        y = x.new_empty(len(tokens), x.shape[1])
        for tokens_e, y_e, weight1, bias1, weight2, bias2 in zip(
            tokens.split(counts), y.split(counts), *weights, strict=True
        ):
            hidden = torch.addmm(bias1, x.index_select(0, tokens_e), weight1.t())
            torch.addmm(bias2, F.gelu(hidden), weight2.t(), out=y_e)
        return y

    return Rows(tokens, place, mlp)


def grouped_rows(index: Tensor, num_experts: int) -> Rows:
    """Queue after queue, one launch of torch's grouped product: native on Hopper in half precision."""
    queues = sort_by_expert(index, num_experts)

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=queues.ends) + bias[queues.expert]

    return _rows(queues.tokens(index.shape[-1]), queues.place.view_as(index), linear)


def blocked_rows(index: Tensor, num_experts: int) -> Rows:
    """Each queue filled up to whole blocks of rows, one batched product over the blocks: for precisions without a grouped product.

    ⌊S·K/block⌋ + N blocks are enough for any routing, so the shapes are static. Rows that fill up compute token 0 and are never read.
    A pair's place in its queue is a running count, which takes fewer launches than a sort.
    """
    device, flat, pairs = index.device, index.flatten(), index.numel()
    block = min(max(1 << (pairs // (4 * num_experts)).bit_length(), 16), 256)
    num_blocks = pairs // block + num_experts
    running = (torch.arange(num_experts, device=device)[:, None] == flat).cumsum(1)  # (N, S·K)
    blocks = (running[:, -1] + (block - 1)).div(block, rounding_mode="floor")
    block_ends = blocks.cumsum(0)
    starts = (block_ends - blocks) * block - 1
    place = starts.index_select(0, flat) + running.gather(0, flat[None])[0]
    owner = torch.arange(pairs, device=device).div(index.shape[-1], rounding_mode="floor")
    tokens = torch.zeros(num_blocks * block, dtype=torch.int64, device=device).scatter_(0, place, owner)
    expert = torch.searchsorted(block_ends, torch.arange(num_blocks, device=device), right=True).clamp_(
        max=num_experts - 1
    )

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        product = torch.baddbmm(bias[expert, None], x.view(num_blocks, block, -1), weight[expert].transpose(1, 2))
        return product.view(num_blocks * block, -1)

    return _rows(tokens, place.view_as(index), linear)


def balanced_rows(index: Tensor, num_experts: int) -> Rows:
    """For meta tensors, which carry no routing: queues as equal as S·K rows over N experts allow, at exactly the routed cost."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        short, longer = divmod(len(x), len(weight))
        parts = []
        for rows, first, last in ((short + 1, 0, longer), (short, longer, len(weight))):
            if rows and first < last:
                queue = x[: rows * (last - first)].view(last - first, rows, -1)
                product = torch.baddbmm(bias[first:last, None], queue, weight[first:last].transpose(1, 2))
                parts.append(product.view(-1, weight.shape[1]))
        return torch.cat(parts)

    queues = sort_by_expert(index, num_experts)
    return _rows(queues.tokens(index.shape[-1]), queues.place.view_as(index), linear)


def combine(y: Tensor, gates: Tensor, rows: Rows) -> Tensor:
    """Each token's K rows of ``y`` (M, D), weighted with its ``gates`` (S, K) and summed: (S, D)."""
    out: Tensor = _Combine.apply(y, gates, rows.tokens, rows.place)
    return out


def _sum_rows(table: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """Rows ``table[index]`` (S, K, D), weighted (S, K), summed over K: (S, D)."""
    if table.device.type == "cpu":  # one pass, 10 times faster there
        return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
    rows = table.index_select(0, index.flatten()).view(*index.shape, -1)
    return (rows if weight is None else rows * weight[..., None]).sum(1)


class _Dispatch(torch.autograd.Function):
    """The gradient is a sum of gathered rows, where autograd would scatter."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _sum_rows(grad.contiguous(), place), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, gates: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(y, gates, tokens, place)
        return _sum_rows(y, place, gates)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y, gates, tokens, place = ctx.saved_tensors  # type: ignore[attr-defined]
        spread = grad.index_select(0, tokens)
        grad_gates = torch.linalg.vecdot(y, spread).index_select(0, place.flatten()).view_as(gates)
        gate_of_row = gates.new_zeros(len(tokens)).scatter_(0, place.flatten(), gates.flatten())
        return spread * gate_of_row[:, None], grad_gates, None, None


class _QueuedLinear(torch.autograd.Function):
    """A linear layer per queue: rows of ``x`` (M, in) times ``weight`` (N, out, in), written in place."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts  # type: ignore[attr-defined]
        out = x.new_empty(len(x), weight.shape[1])
        for x_e, out_e, weight_e, bias_e in zip(x.split(counts), out.split(counts), weight, bias, strict=True):
            torch.addmm(bias_e, x_e, weight_e.t(), out=out_e)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        counts: list[int] = ctx.counts  # type: ignore[attr-defined]
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        grad_bias = weight.new_empty(weight.shape[:2])
        rows = (tensor.split(counts) for tensor in (x, grad, grad_x))
        for x_e, grad_e, grad_x_e, weight_e, grad_weight_e, grad_bias_e in zip(
            *rows, weight, grad_weight, grad_bias, strict=True
        ):
            torch.mm(grad_e, weight_e, out=grad_x_e)
            torch.mm(grad_e.t(), x_e, out=grad_weight_e)
            torch.sum(grad_e, 0, out=grad_bias_e)
        return grad_x, grad_weight, grad_bias, None
