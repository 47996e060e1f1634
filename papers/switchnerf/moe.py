"""Sparse top-1 routing: capacity, batch-prioritised order, dispatch and combination, balance loss (Switch-NeRF; V-MoE's BPR).

With a capacity all shapes are static: E·C slots, empty ones filled with some point whose result nobody reads, so that neither a graph
nor a GPU waits for the counts. Without a capacity points are sorted by expert and nothing is dropped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def capacity(points: int, experts: int, factor: float, k: int = 1) -> int:
    """Points that one expert takes of a chunk: k·int(factor·⌈points/experts⌉)."""
    return k * int(factor * math.ceil(points / experts))


class _Rows(torch.autograd.Function):
    """Rows of x by number. The gradient comes back by the inverse numbers: a read, where scattering would need atomic additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, numbers.clamp(max=x.shape[0] - 1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = grad.index_select(0, inverse.clamp(max=grad.shape[0] - 1))
        return rows.masked_fill((inverse >= grad.shape[0])[:, None], 0.0), None, None


@dataclass(frozen=True)
class Dispatch:
    """Which point each row of the experts' input comes from, and in which row each point is. Rows are sorted by expert.

    ``source`` (rows,) holds point numbers, ``points`` where a slot is empty; ``row`` (points,) the inverse, the number of rows where a
    point was dropped; ``offsets`` (E + 1,) bounds the segments.
    """

    source: Tensor
    row: Tensor
    offsets: Tensor
    slots: int | None  # rows of every expert; None without a capacity
    points: int
    expert: Tensor  # (points,) chosen expert
    value: Tensor  # (points,) its probability
    kept: Tensor  # (points,) bool

    def gather(self, x: Tensor) -> Tensor:
        """Rows of ``x`` (points, …) in the experts' order; an empty slot holds some point whose result nobody reads."""
        result: Tensor = _Rows.apply(x, self.source, self.row)
        return result

    def combine(self, y: Tensor) -> Tensor:
        """Results (rows, D) back in the points' order, times the gate's value; exact zeros for dropped points."""
        rows: Tensor = _Rows.apply(y, self.row, self.source)
        return rows * (self.value * self.kept)[:, None].to(y.dtype)


def dispatch(probabilities: Tensor, slots: int | None, prioritised: bool = True) -> Dispatch:
    """Route every point to its likeliest expert.

    Args:
        probabilities: (points, E), float32.
        slots: capacity C of each expert; what comes later is dropped. None: no limit.
        prioritised: the most certain points come first (BPR); otherwise the order of the points decides.
    """
    points, experts = probabilities.shape
    value, expert = probabilities.max(dim=-1)
    # One sort for (expert ascending, value descending): the value moves the key by less than 1/2. Double keeps values apart.
    key = expert.double() + (0.5 - 0.5 * value.detach().double() if prioritised else 0.0)
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=key.device).index_add(0, expert, torch.ones_like(expert))
    ends = counts.cumsum(0)
    if slots is None:
        row = torch.zeros_like(order).index_copy(0, order, torch.arange(points, device=key.device))
        kept = torch.ones_like(expert, dtype=torch.bool)
        return Dispatch(order, row, F.pad(ends, (1, 0)), None, points, expert, value, kept)
    sorted_expert = expert.index_select(0, order)
    place = torch.arange(points, device=key.device) - (ends - counts).index_select(0, sorted_expert)
    fits = place < slots
    slot = torch.where(fits, sorted_expert * slots + place, experts * slots)
    source = torch.full((experts * slots + 1,), points, dtype=torch.int64, device=key.device)
    source = source.index_copy(0, slot, torch.where(fits, order, points))[:-1]
    row = torch.zeros_like(order).index_copy(0, order, slot)
    offsets = torch.arange(experts + 1, device=key.device) * slots
    return Dispatch(source, row, offsets, slots, points, expert, value, row < experts * slots)


def balance_loss(probabilities: Tensor, expert: Tensor) -> Tensor:
    """E · Σ_e (mean probability of e) · (share of points whose first choice is e, before any are dropped). 1 for a uniform gate."""
    points, experts = probabilities.shape
    share = torch.zeros(experts, dtype=probabilities.dtype, device=probabilities.device)
    share = share.index_add(0, expert, torch.ones_like(expert, dtype=probabilities.dtype)) / points
    return experts * (probabilities.mean(dim=0) * share).sum()


class ExpertLinear(nn.Module):
    """One linear layer per expert, initialised as torch's own for each."""

    def __init__(self, experts: int, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(experts, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(experts, 1, outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(E, C, inputs) -> (E, C, outputs)."""
        if self.bias is None:
            return torch.bmm(x, self.weight)
        return torch.baddbmm(self.bias, x, self.weight)

    def grouped(self, x: Tensor, ends: Tensor, expert: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs), rows sorted by ``expert`` (rows,), segments of any length that end at ``ends`` (E,)."""
        y: Tensor = F.grouped_mm(x, self.weight.to(x.dtype), offs=ends)
        return y if self.bias is None else y + self.bias[:, 0].to(x.dtype).index_select(0, expert)

    def one(self, x: Tensor, expert: int) -> Tensor:
        """(n, inputs) -> (n, outputs) of a single expert."""
        return F.linear(x, self.weight[expert].t(), None if self.bias is None else self.bias[expert, 0])


class ExpertMLP(nn.Module):
    """An MLP per expert, ReLU between its layers.

    Args:
        widths: of input, hidden layers and output.
        skip_after: after this layer the expert's input is added before the ReLU (Switch-NeRF); None for no skip.
    """

    def __init__(self, experts: int, widths: Sequence[int], bias: bool = True, skip_after: int | None = None) -> None:
        super().__init__()
        self.skip_after = skip_after
        self.layers = nn.ModuleList(ExpertLinear(experts, a, b, bias) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor, routed: Dispatch) -> Tensor:
        """(rows, D) sorted by expert -> (rows, outputs).

        With a capacity one batched product per layer. Without: on a GPU under bfloat16 autocast one grouped product per layer, which
        reads the segments' bounds on the device, so that shapes are static here too; elsewhere expert by expert.
        """
        if routed.slots is not None:
            batched = x.view(len(routed.offsets) - 1, routed.slots, -1)
            return self._run(batched, lambda layer, h: layer(h)).flatten(0, 1)
        if x.is_cuda and torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16:
            return self.grouped(x.to(torch.bfloat16), routed)
        sizes = routed.offsets.diff().tolist()
        parts = [self.one(part, expert) for expert, part in enumerate(x.split(sizes)) if len(part)]
        return torch.cat(parts)

    def grouped(self, x: Tensor, routed: Dispatch) -> Tensor:
        """(rows, D) sorted by expert -> (rows, outputs) without a capacity; the segments' bounds stay on the device."""
        expert, ends = routed.expert.index_select(0, routed.source), routed.offsets[1:].to(torch.int32)
        return self._run(x, lambda layer, h: layer.grouped(h, ends, expert))

    def one(self, x: Tensor, expert: int) -> Tensor:
        """(n, D) -> (n, outputs) of a single expert."""
        return self._run(x, lambda layer, h: layer.one(h, expert))

    def _run(self, x: Tensor, apply: Callable[[ExpertLinear, Tensor], Tensor]) -> Tensor:
        h = x
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, ExpertLinear)
            h = apply(layer, h)
            if index == self.skip_after:
                h = h + x
            if index + 1 < len(self.layers):
                h = torch.relu(h)
        return h
