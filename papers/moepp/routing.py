"""Who computes which token: expert kinds, pathway-aware router, gates, balance loss and capacity (Sec. 3.1 to 3.4).

Experts are numbered as in the authors' code: FFN experts first, then constant, copy and zero experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.moepp import cpu
from shared.errors import UserError, unknown

Gating: TypeAlias = Literal["paper", "repo", "mixtral"]
GATINGS: tuple[str, ...] = get_args(Gating)
DropOrder: TypeAlias = Literal["choice", "gate"]


@dataclass(frozen=True)
class Experts:
    """How many experts of each kind a layer has."""

    ffn: int
    constant: int = 0
    copy: int = 0
    zero: int = 0

    def __post_init__(self) -> None:
        if self.ffn < 1 or min(self.constant, self.copy, self.zero) < 0:
            raise UserError(f"a layer needs at least one FFN expert and no negative number of others, got {self}")

    @property
    def zero_computation(self) -> int:
        """Z, the experts without a GEMM."""
        return self.constant + self.copy + self.zero

    @property
    def total(self) -> int:
        """N = E + Z."""
        return self.ffn + self.zero_computation

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each expert, by id."""
        return ("ffn",) * self.ffn + ("constant",) * self.constant + ("copy",) * self.copy + ("zero",) * self.zero

    def eta(self, tau: float) -> tuple[float, ...]:
        """Weights of the balance loss: 1 for FFN experts, tau for the others (Eq. 7)."""
        return (1.0,) * self.ffn + (tau,) * self.zero_computation

    def ffn_share(self, tau: float) -> float:
        """rho, the share of assignments that FFN experts get at the loss's fixed point (Tab. 1)."""
        return tau * self.ffn / (tau * self.ffn + self.zero_computation)


@dataclass(frozen=True)
class Routing:
    """A router's decision for T tokens."""

    logits: Tensor  # [T, N] fp32, what the next layer's router is given
    gates: Tensor  # [T, K] fp32
    ids: Tensor  # [T, K] int64


def published_constants(ffn: int, zero: int = 1, copy: int = 1) -> int:
    """Number of constant experts by Eq. 10. It gives 1 for 8 FFN experts, where Tab. 2 has 2."""
    return max(ffn // 4 - zero - copy, 1)


class Router(nn.Module):
    """Logits of all experts in fp32: W·x plus, with ``pathway``, W_g times the previous layer's logits (Eq. 6).

    ``two_layer`` is the released code's router: d to 8N, tanh, to N, without biases.
    """

    def __init__(
        self, d_model: int, experts: int, *, pathway: bool, two_layer: bool = False, std: float = 0.02
    ) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(8 * experts, d_model) * std) if two_layer else None
        self.weight = nn.Parameter(torch.randn(experts, 8 * experts if two_layer else d_model) * std)
        self.pathway = nn.Parameter(torch.randn(experts, experts) * std) if pathway else None

    def forward(self, x: Tensor, carried: Tensor | None = None) -> Tensor:
        """Logits [T, N] of tokens [T, d]; ``carried``: the previous layer's logits, or None in the first layer."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            value = x.to(dtype)
            if self.hidden is not None:
                value = torch.tanh(F.linear(value, self.hidden.to(dtype)))
            logits = F.linear(value, self.weight.to(dtype))
            if carried is not None and self.pathway is not None:
                logits = logits + F.linear(carried.to(dtype), self.pathway.to(dtype))
            return logits


def select(logits: Tensor, k: int, experts: Experts, gating: Gating = "paper") -> Routing:
    """The K experts of every token and their gates.

    ``paper``: softmax over all experts, not renormalised (Eq. 1). ``mixtral``: softmax over the K chosen logits. ``repo``, the released
    code's default: softmax over all, the zero expert's gate set to 0, the others renormalised (its inputs are also multiplied by
    K, which the layer does). Raises UserError for another name, and for ``repo`` with K zero experts, whose gates would be 0/0.
    """
    if gating not in GATINGS:
        raise unknown("gating", gating, GATINGS)
    if gating == "repo" and experts.zero >= k:
        raise UserError(f"gating 'repo' divides 0 by 0 when all {k} picks are zero experts: use fewer zero experts")
    quick = cpu.usable(logits)
    if gating == "mixtral":
        chosen, ids = cpu.top(logits, k) if quick else torch.topk(logits, k, dim=-1)
        return Routing(logits, cpu.softmax_of_few(chosen) if quick else torch.softmax(chosen, -1), ids)
    probabilities = torch.softmax(logits, -1)
    gates, ids = cpu.top(probabilities, k) if quick else torch.topk(probabilities, k, dim=-1)
    if gating == "repo":
        gates = torch.where(ids >= experts.total - experts.zero, torch.zeros_like(gates), gates)
        gates = gates / gates.sum(-1, keepdim=True)
    return Routing(logits, gates, ids)


def balance_loss(logits: Tensor, ids: Tensor, eta: Tensor) -> Tensor:
    """L_b = Σ eta_i · f_i · P_i (Eq. 7): f_i the share of tokens that pick i (sums to K), P_i the mean probability (sums to 1).

    f counts all K picks, before capacity drops any. No factor N, unlike other MoE losses.
    """
    picked = torch.zeros(logits.shape[1], dtype=logits.dtype, device=logits.device)
    picked = picked.scatter_add(0, ids.reshape(-1), torch.ones(ids.numel(), dtype=logits.dtype, device=logits.device))
    return (eta * (picked / logits.shape[0]) * torch.softmax(logits, -1).mean(0)).sum()


def capacities(tokens: int, k: int, experts: Experts, tau: float, gamma: float) -> tuple[int, int]:
    """Assignments that one FFN and one zero-computation expert accept (Eq. 8), of K·T in all, rounded up.

    The paper writes T; read as tokens, at least 45 % of the assignments would be dropped.
    """
    share = gamma * k * tokens / (tau * experts.ffn + experts.zero_computation)
    return math.ceil(share * tau - 1e-9), math.ceil(share - 1e-9)


def within_capacity(routing: Routing, limits: Tensor, order: DropOrder = "choice") -> Tensor:
    """Which assignments [T, K] fit into ``limits`` [N] per expert.

    ``choice``: all first choices go before all second ones, then by position. ``gate``: the largest gates go first.
    """
    ids = routing.ids
    if order == "choice":
        sequence = ids.t().reshape(-1)
        kept = _rank(sequence) < limits[sequence]
        return kept.view(ids.shape[1], ids.shape[0]).t()
    by_gate = torch.argsort(routing.gates.reshape(-1), descending=True, stable=True)
    sequence = ids.reshape(-1)[by_gate]
    kept = torch.empty_like(sequence, dtype=torch.bool)
    kept[by_gate] = _rank(sequence) < limits[sequence]
    return kept.view_as(ids)


def _rank(sequence: Tensor) -> Tensor:
    """How many equal entries stand before each entry."""
    order = torch.argsort(sequence, stable=True)
    ordered = sequence[order]
    first = torch.searchsorted(ordered, ordered)
    rank = torch.empty_like(sequence)
    rank[order] = torch.arange(sequence.numel(), device=sequence.device) - first
    return rank
