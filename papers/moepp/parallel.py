"""Expert parallelism: FFN experts are spread over the ranks, zero-computation experts are on every one (Sec. 1, 3.4).

Assignments to zero-computation experts never leave their rank, so an all-to-all carries rho times the vanilla layer's bytes; their mix
is computed while the dispatch is under way. Split sizes have to reach the host once per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from papers.moepp import paths
from papers.moepp.layer import MoEPlusPlus, Output
from papers.moepp.routing import balance_loss
from papers.moepp.zero import dense_mix
from shared.errors import UserError


@dataclass(frozen=True)
class Traffic:
    """What one rank's dispatch carried; the combine carries the same rows back."""

    rows_to_others: int
    rows_kept: int
    rows_received: int
    row_bytes: int

    @property
    def sent_bytes(self) -> int:
        """Bytes that left this rank in the dispatch."""
        return self.rows_to_others * self.row_bytes


class _Exchange(torch.autograd.Function):
    """An all-to-all of rows; backward sends the gradients the other way. The result is valid after ``works[-1].wait()``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: Any, works: list[Any]) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = rows.new_empty(sum(receive), rows.shape[1])
        works.append(dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group, async_op=True))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = grads[0].new_empty(sum(ctx.send), grads[0].shape[1])
        dist.all_to_all_single(back, grads[0].contiguous(), ctx.send, ctx.receive, group=ctx.group)
        return back, None, None, None, None


class ExpertParallel(nn.Module):
    """One layer over the ranks of a process group: router and zero-computation experts replicated, FFN experts in blocks of E/P.

    Args:
        layer: the whole layer, equal on every rank; this rank keeps its block of ``w_in`` and ``w_out``. It must drop nothing.
        group: a process group, or None for the default one.
        overlap: compute the zero-computation mix while the dispatch is under way.

    Raises:
        UserError: E is not a multiple of the number of ranks, or the layer has a capacity or gating ``repo``.
    """

    def __init__(self, layer: MoEPlusPlus, group: Any = None, *, overlap: bool = True) -> None:
        super().__init__()
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)
        experts = layer.experts.ffn
        if experts % self.ranks:
            raise UserError(f"{experts} FFN experts cannot be spread evenly over {self.ranks} ranks")
        if layer.capacity_factor is not None or layer.gating == "repo":
            raise UserError("expert parallelism takes a dropless layer with gating 'paper' or 'mixtral'")
        self.group, self.overlap, self.layer = group, overlap, layer
        block = slice(self.rank * experts // self.ranks, (self.rank + 1) * experts // self.ranks)
        self.w_in = nn.Parameter(layer.w_in.detach()[block].clone())
        self.w_out = nn.Parameter(layer.w_out.detach()[block].clone())
        if self.ranks > 1:
            del layer.w_in, layer.w_out
        self.traffic: Traffic | None = None

    def forward(self, x: Tensor, carried: Tensor | None = None) -> Output:
        """As :meth:`MoEPlusPlus.forward`, for this rank's tokens."""
        layer = self.layer
        if self.ranks == 1:
            self.traffic = Traffic(0, 0, 0, x.shape[-1] * x.element_size())
            return layer(x, carried)
        tokens = x.reshape(-1, x.shape[-1])
        before = None if carried is None else carried.reshape(-1, layer.experts.total)
        routing = layer.route(tokens, before)
        loss = routing.logits.new_zeros(())
        if torch.is_grad_enabled():
            loss = balance_loss(routing.logits, routing.ids, layer.eta) * layer.lb_scale
        y = self.compute(tokens, routing.ids, routing.gates)
        shape = x.shape[:-1]
        return Output(y.view(x.shape), routing.logits.view(*shape, -1), loss, routing.ids.view(*shape, -1))

    def compute(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """All experts on this rank's tokens x [T, d] whose routing [T, K] is given."""
        if x.is_cuda and not torch.is_grad_enabled() and self.layer.path in ("auto", "fused"):
            from papers.moepp import kernels

            if kernels.fits(x, self.w_in, self.w_out) and self.layer.experts.ffn <= kernels.MAX_EXPERTS:
                return self._compute_fused(x.contiguous(), ids.int(), gates)
        layer, k, ids = self.layer, ids.shape[1], ids.long()
        experts = layer.experts.ffn
        order, place, ends = paths.group(ids, experts)
        send, receive, received = self._sizes(ends)
        rows = x.index_select(0, torch.div(order[: sum(send)], k, rounding_mode="floor"))
        works: list[Any] = []
        arrived = self._exchange(rows, send, receive, works)
        if not self.overlap:
            works[-1].wait()
        pair = () if layer.constants is None else (layer.constants.weight, layer.constants.vector)
        mixed = (
            dense_mix(x, ids, gates, layer.experts, *pair) if layer.experts.zero_computation else torch.zeros_like(x)
        )
        if self.overlap:
            works[-1].wait()
        back = self._exchange(self._experts(arrived, self._which(received)), receive, send, works)
        works[-1].wait()
        return mixed + paths.gated_sum(back, place, ids < experts, gates) if len(back) else mixed

    def _compute_fused(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """The same with the Triton kernels: one pass to pick rows, one to combine; without overlap the mix is part of the latter."""
        from papers.moepp import kernels

        layer = self.layer
        experts, copies = layer.experts.ffn, layer.experts.copy
        w_const, v_const = (None, None) if layer.constants is None else (layer.constants.weight, layer.constants.vector)
        place = kernels.sort_assignments(ids, experts, 1)
        send, receive, received = self._sizes(place.ends)
        works: list[Any] = []
        arrived = self._exchange(x.index_select(0, place.token_of_row[: sum(send)]), send, receive, works)
        mixed = None
        if self.overlap and layer.experts.zero_computation:
            nowhere = replace(place, position=torch.full_like(place.position, -1))
            mixed = kernels.combine(x, nowhere, ids, gates, x, experts, w_const, v_const, copies)
            w_const, v_const, copies = None, None, 0
        works[-1].wait()
        back = self._exchange(self._experts(arrived, self._which(received)), receive, send, works)
        works[-1].wait()
        y = kernels.combine(back, place, ids, gates, x, experts, w_const, v_const, copies)
        return y if mixed is None else y.add_(mixed)

    def _sizes(self, ends: Tensor) -> tuple[list[int], list[int], Tensor]:
        """Rows to send to and to receive from each rank, and rows to receive by source and expert [P·E/P]."""
        sent = torch.diff(ends, prepend=ends.new_zeros(1)).long()  # per expert
        received = self._counts(sent)
        both = torch.stack([sent, received]).view(2, self.ranks, -1).sum(2).tolist()  # the one wait for the device
        row_bytes = self.w_in.shape[-1] * self.w_in.element_size()
        self.traffic = Traffic(sum(both[0]) - both[0][self.rank], both[0][self.rank], sum(both[1]), row_bytes)
        return both[0], both[1], received

    def _counts(self, sent: Tensor) -> Tensor:
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return received

    def _exchange(self, rows: Tensor, send: list[int], receive: list[int], works: list[Any]) -> Tensor:
        out: Tensor = _Exchange.apply(rows, send, receive, self.group, works)
        return out

    def _which(self, received: Tensor) -> Tensor:
        """This rank's expert of every received row [n, 1]."""
        block = self.w_in.shape[0]
        which = torch.arange(block, device=received.device).repeat(self.ranks)
        assert self.traffic is not None
        return which.repeat_interleave(received, output_size=self.traffic.rows_received)[:, None]

    def _experts(self, rows: Tensor, ids: Tensor) -> Tensor:
        """This rank's experts on rows from all ranks, each row one assignment with gate 1."""
        if rows.shape[0] == 0:
            return rows * 1.0
        gates = torch.ones(ids.shape, device=rows.device)
        if rows.is_cuda and self.layer.path in ("auto", "fused"):
            from papers.moepp import kernels
            from papers.moepp.fused import fused
            from papers.moepp.routing import Experts

            if kernels.fits(rows, self.w_in, self.w_out):
                return fused(rows, ids, gates, self.w_in, self.w_out, Experts(self.w_in.shape[0]), 1.0)
        return paths.sorted_loop(rows, ids, gates, self.w_in, self.w_out)
