"""FFN experts on routed tokens, four ways that agree: loop (the oracle), sorted, grouped and capacity.

Each takes x [T, d], ids [T, K] (E or more: no FFN expert), gates [T, K], w_in [E, 2h, d] (gate half first) and w_out [E, d, h], and
returns the gated sum [T, d]. :mod:`papers.moepp.fused` adds the Triton kernels, which also mix in the zero-computation experts.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Path: TypeAlias = Literal["auto", "loop", "sorted", "grouped", "capacity", "fused"]
PATHS: tuple[str, ...] = get_args(Path)


def swiglu(rows: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """One expert: W_down(silu(W_g·x) · (W_u·x)) for rows [n, d]."""
    gate, up = F.linear(rows, w_in).chunk(2, -1)
    return F.linear(F.silu(gate) * up, w_out)


def loop(x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Expert by expert as in the authors' code: select, compute, scale, add. Slow, and the reference for the others."""
    y = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, gates.dtype), device=x.device)
    for expert in range(w_in.shape[0]):
        token, choice = torch.where(ids == expert)
        out = swiglu(x[token], w_in[expert], w_out[expert])
        y = y.index_add(0, token, gates[token, choice, None] * out.to(y.dtype))
    return y.to(x.dtype)


def group(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Assignments sorted by FFN expert: their order [K·T], the place of each in it [T, K], and the end of each group [E] (int32).

    Zero-computation assignments come last, past the end of the last group, so that nothing depends on their number.
    """
    keys = ids.reshape(-1).clamp(max=experts).to(torch.int16)
    ordered, order = torch.sort(keys, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=ids.device)
    ends = torch.searchsorted(
        ordered.to(torch.int32), torch.arange(experts, device=ids.device, dtype=torch.int32), right=True
    )
    return order, place.view_as(ids), ends.to(torch.int32)


def sorted_loop(x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """One gather, contiguous slices, one weighted gather back: the CPU's way. It asks for the group sizes, which costs a GPU a stall."""
    experts, k = w_in.shape[0], ids.shape[1]
    order, place, ends = group(ids, experts)
    ends_list = ends.tolist()
    count = ends_list[-1]
    if count == 0:
        return x * 0.0 + w_in.sum() * 0.0 + w_out.sum() * 0.0 if torch.is_grad_enabled() else torch.zeros_like(x)
    rows = x.index_select(0, torch.div(order[:count], k, rounding_mode="floor"))
    sizes = [end - start for start, end in zip([0, *ends_list[:-1]], ends_list, strict=True)]
    parts = [
        swiglu(part, w, v)
        for part, w, v in zip(rows.split(sizes), w_in.unbind(), w_out.unbind(), strict=True)
        if len(part)
    ]
    return gated_sum(torch.cat(parts), place, ids < experts, gates)


def gated_sum(rows: Tensor, place: Tensor, here: Tensor, gates: Tensor) -> Tensor:
    """Σ over a token's picks of gate · row [T, d]; ``place`` [T, K] is a pick's row, ``here`` whether it has one. Needs a row or more."""
    weights = torch.where(here, gates, torch.zeros_like(gates)).to(rows.dtype)
    index = torch.where(here, place, torch.zeros_like(place))
    if rows.is_cuda:  # no bfloat16 gradient of an embedding bag there
        return (rows.index_select(0, index.reshape(-1)).view(*index.shape, -1) * weights[..., None]).sum(1)
    return F.embedding_bag(index, rows, per_sample_weights=weights, mode="sum")


def grouped(x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Sort, two grouped products, inverse-permutation gather; no host synchronisation and shapes that do not depend on the routing.

    Rows past the last group are uninitialised memory in torch's product, forward and backward, hence the two masks.
    """
    experts, k = w_in.shape[0], ids.shape[1]
    order, place, ends = group(ids, experts)
    inside = torch.arange(order.numel(), device=x.device) < ends[-1]
    rows = x.index_select(0, torch.div(order, k, rounding_mode="floor"))
    rows = torch.where(inside[:, None], rows, torch.zeros_like(rows))
    gate, up = F.grouped_mm(rows, w_in.transpose(-2, -1), offs=ends).chunk(2, -1)
    out = F.grouped_mm(F.silu(gate) * up, w_out.transpose(-2, -1), offs=ends)
    out = torch.where(inside[:, None], out, torch.zeros_like(out))
    picked = out.index_select(0, place.reshape(-1)).view(*ids.shape, -1)
    return (picked * gates[..., None]).sum(1).to(x.dtype)


def capacity(x: Tensor, ids: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, slots: int) -> Tensor:
    """Every expert computes ``slots`` rows, padded with zeros: static shapes, two batched products. Assignments beyond are lost."""
    experts, k = w_in.shape[0], ids.shape[1]
    _, place, ends = group(ids, experts)
    starts = F.pad(ends[:-1], (1, 0)).long()
    expert = ids.clamp(max=experts - 1)
    slot = place - starts[expert]
    kept = (ids < experts) & (slot < slots)
    target = torch.where(kept, expert * slots + slot, experts * slots)
    token = torch.arange(x.shape[0], device=x.device).repeat_interleave(k)
    buffer = torch.zeros(experts * slots + 1, x.shape[1], dtype=x.dtype, device=x.device)
    buffer = buffer.index_add(0, target.reshape(-1), x.index_select(0, token) * kept.reshape(-1, 1).to(x.dtype))
    gate, up = torch.bmm(buffer[:-1].view(experts, slots, -1), w_in.transpose(-2, -1)).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, w_out.transpose(-2, -1)).view(experts * slots, -1)
    picked = F.pad(out, (0, 0, 0, 1)).index_select(0, target.reshape(-1)).view(*ids.shape, -1)
    return (picked * (gates * kept)[..., None]).sum(1).to(x.dtype)
