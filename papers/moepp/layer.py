"""The layer as a torch module: :class:`MoEPlusPlus`, and the vanilla :class:`MoE` that it is compared with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from papers.moepp import cpu, paths
from papers.moepp.paths import PATHS, Path
from papers.moepp.routing import (
    DropOrder,
    Experts,
    Gating,
    Router,
    Routing,
    balance_loss,
    capacities,
    select,
    within_capacity,
)
from papers.moepp.zero import ConstantExperts, dense_mix
from shared.errors import UserError, unknown


class Output(NamedTuple):
    """What a layer returns."""

    y: Tensor  # like x
    logits: Tensor  # [..., N] fp32: give it to the next layer as ``carried``
    balance_loss: Tensor  # scalar, Eq. 7 times ``lb_scale``; 0 where no gradient is wanted
    ids: Tensor  # [..., K] chosen experts (int32 or int64), N where capacity dropped the assignment


class MoEPlusPlus(nn.Module):
    """Top-K mixture of SwiGLU experts and zero-computation experts, in place of a transformer block's FFN (Sec. 3).

    Args:
        d_model, d_expert: d and h.
        n_ffn, n_constant, n_copy, n_zero: experts of each kind.
        k: experts per token.
        tau: share steering of the balance loss and the capacity; smaller means fewer FFN experts per token.
        pathway: let the router see the previous layer's logits (Eq. 6).
        gating: ``paper`` (Eq. 1), ``repo`` (released code) or ``mixtral``; see :func:`papers.moepp.routing.select`.
        capacity_factor: gamma of Eq. 8, or None to drop nothing.
        drop_order: what goes first where capacity is short.
        lb_scale: factor on the balance loss; 1 is the paper's, N that of other MoE losses (None).
        path: how the experts run: ``auto`` takes ``fused`` on CUDA and ``sorted`` on a CPU.
        two_layer_router: the released code's router.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        n_ffn: int,
        *,
        n_constant: int = 2,
        n_copy: int = 1,
        n_zero: int = 1,
        k: int = 2,
        tau: float = 0.75,
        pathway: bool = True,
        gating: Gating = "paper",
        capacity_factor: float | None = None,
        drop_order: DropOrder = "choice",
        lb_scale: float | None = 1.0,
        path: Path = "auto",
        two_layer_router: bool = False,
    ) -> None:
        super().__init__()
        self.experts = Experts(n_ffn, n_constant, n_copy, n_zero)
        if not 1 <= k <= self.experts.total:
            raise UserError(f"k must lie between 1 and the {self.experts.total} experts of the layer, got {k}")
        if tau <= 0:
            raise UserError(f"tau must be positive, got {tau}")
        if path not in PATHS:
            raise unknown("path", path, PATHS)
        if path == "capacity" and capacity_factor is None:
            raise UserError("path 'capacity' needs a capacity_factor")
        self.k, self.tau, self.gating, self.path = k, tau, gating, path
        self.capacity_factor, self.drop_order = capacity_factor, drop_order
        self.input_scale = float(k) if gating == "repo" else 1.0  # the released code multiplies the experts' input by K
        self.lb_scale = float(self.experts.total) if lb_scale is None else lb_scale
        self.router = Router(d_model, self.experts.total, pathway=pathway, two_layer=two_layer_router)
        self.w_in = nn.Parameter(torch.randn(n_ffn, 2 * d_expert, d_model) * d_model**-0.5)
        self.w_out = nn.Parameter(torch.randn(n_ffn, d_model, d_expert) * d_expert**-0.5)
        self.constants = ConstantExperts(n_constant, d_model) if n_constant else None
        self.register_buffer("eta", torch.tensor(self.experts.eta(tau)), persistent=False)
        self.eta: Tensor

    def forward(self, x: Tensor, carried: Tensor | None = None) -> Output:
        """x: [..., d]; ``carried``: logits of the previous layer [..., N]. Tokens of all leading dimensions form one batch."""
        tokens = x.reshape(-1, x.shape[-1])
        before = None if carried is None else carried.reshape(-1, self.experts.total)
        routing = self.route(tokens, before)
        loss = routing.logits.new_zeros(())
        if torch.is_grad_enabled():
            loss = balance_loss(routing.logits, routing.ids, self.eta) * self.lb_scale
        if self.capacity_factor is not None:
            routing = self._drop(routing, tokens.shape[0])
        y = self.compute(tokens, routing.ids, routing.gates)
        shape = x.shape[:-1]
        return Output(y.view(x.shape), routing.logits.view(*shape, -1), loss, routing.ids.view(*shape, -1))

    def compute(self, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        """All experts on tokens x [T, d] whose routing [T, K] is given; an id of N belongs to no expert."""
        w_in: Tensor = self.w_in
        w_out: Tensor = self.w_out
        pair: tuple[Tensor, ...] = () if self.constants is None else (self.constants.weight, self.constants.vector)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
            pair = tuple(t.to(dtype) for t in pair)
        if self.input_scale != 1.0:
            x = x * self.input_scale
        with torch.autocast(x.device.type, enabled=False):
            path = self._path(x)
            if path == "fused":
                from papers.moepp.fused import fused

                return fused(
                    x.contiguous(), ids, gates, w_in, w_out, self.experts, self.experts.ffn_share(self.tau), *pair
                )
            if path == "capacity":
                slots = self._limits(x.shape[0])[0]
                y = paths.capacity(x, ids, gates, w_in, w_out, slots)
            else:
                quick = cpu.forward if cpu.usable(x) else paths.sorted_loop
                run = {"loop": paths.loop, "sorted": quick, "grouped": paths.grouped}[path]
                y = run(x, ids, gates, w_in, w_out)
            return y + dense_mix(x, ids, gates, self.experts, *pair) if self.experts.zero_computation else y

    def ffn_per_token(self, ids: Tensor) -> Tensor:
        """FFN experts that each token used, [...], from the ids of an :class:`Output`."""
        return (ids < self.experts.ffn).sum(-1)

    def extra_repr(self) -> str:
        return f"{self.experts}, k={self.k}, tau={self.tau}, gating={self.gating}, path={self.path}"

    def route(self, tokens: Tensor, carried: Tensor | None) -> Routing:
        """The router's decision for tokens [T, d], before any is dropped; ``carried``: [T, N] or None."""
        frozen = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if frozen and self.gating != "repo" and self.router.hidden is None and self._path(tokens) == "fused":
            from papers.moepp import kernels

            if self.experts.total <= kernels.MAX_EXPERTS and tokens.dtype in (torch.float32, torch.bfloat16):
                weight = self.router.weight.float()
                pathway = None if self.router.pathway is None else self.router.pathway.float()
                renormalise = self.gating == "mixtral"
                logits, gates, ids = kernels.route(
                    tokens.contiguous(), weight, self.k, carried, pathway, renormalise=renormalise
                )
                return Routing(logits, gates, ids)
        return select(self.router(tokens, carried), self.k, self.experts, self.gating)

    def _limits(self, tokens: int) -> tuple[int, int]:
        assert self.capacity_factor is not None
        ffn, other = capacities(tokens, self.k, self.experts, self.tau, self.capacity_factor)
        return min(ffn, tokens), min(other, tokens)  # a token picks an expert once

    def _drop(self, routing: Routing, tokens: int) -> Routing:
        ffn, other = self._limits(tokens)
        each = [ffn] * self.experts.ffn + [other] * self.experts.zero_computation
        routing = Routing(routing.logits, routing.gates, routing.ids.long())
        kept = within_capacity(routing, torch.tensor(each, device=routing.ids.device), self.drop_order)
        ids = torch.where(kept, routing.ids, self.experts.total)
        return Routing(routing.logits, routing.gates * kept, ids)

    def _path(self, x: Tensor) -> str:
        if self.path != "auto":
            return self.path
        if not x.is_cuda:
            return "sorted"
        plain = "grouped" if x.dtype == torch.bfloat16 else "sorted"
        if torch.compiler.is_compiling() and torch.is_grad_enabled():
            return plain  # torch differentiates and fuses it
        from papers.moepp import kernels

        return "fused" if kernels.fits(x, self.w_in, self.w_out) else plain


class MoE(MoEPlusPlus):
    """The vanilla layer: FFN experts only, no gating residual, every expert weighs the same in the loss."""

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        n_ffn: int,
        *,
        k: int = 2,
        gating: Gating = "paper",
        capacity_factor: float | None = None,
        drop_order: DropOrder = "choice",
        lb_scale: float | None = 1.0,
        path: Path = "auto",
    ) -> None:
        super().__init__(
            d_model, d_expert, n_ffn, n_constant=0, n_copy=0, n_zero=0, k=k, tau=1.0, pathway=False, gating=gating,
            capacity_factor=capacity_factor, drop_order=drop_order, lb_scale=lb_scale, path=path,
        )  # fmt: skip
