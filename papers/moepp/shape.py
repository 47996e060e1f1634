"""Full-scale configurations (Tab. 2) and exact counts: parameters, FLOPs, shares. 1 MAC is 2 FLOPs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from papers.moepp.routing import Experts
from shared.errors import unknown

TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)  # Tab. 3


@dataclass(frozen=True)
class Shape:
    """A decoder whose every FFN is a mixture of experts."""

    name: str
    layers: int
    d_model: int
    d_expert: int
    experts: Experts
    k: int = 2
    vocabulary: int = 65_536

    def vanilla(self) -> Shape:
        """The baseline of equal size: FFN experts only."""
        return replace(self, experts=Experts(self.experts.ffn))

    def rho(self, tau: float) -> float:
        """FFN share of all assignments."""
        return self.experts.ffn_share(tau)


SHAPES = {
    "0.6B": Shape("0.6B", 12, 768, 2048, Experts(8, 2, 1, 1)),
    "1B": Shape("1B", 12, 768, 2048, Experts(16, 2, 1, 1)),
    "2B": Shape("2B", 12, 768, 2048, Experts(32, 6, 1, 1)),
    "7B": Shape("7B", 24, 1536, 4096, Experts(16, 2, 1, 1)),
}


def shape(name: str) -> Shape:
    """A configuration by name. Raises UserError naming those that exist."""
    if name not in SHAPES:
        raise unknown("model", name, SHAPES)
    return SHAPES[name]


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, untied head, RMSNorm gains, one-matrix router, gating residual from the second layer on."""

    embedding: int
    head: int
    attention: int
    norms: int
    ffn_experts: int
    zero_computation: int
    router: int
    pathway: int

    @property
    def total(self) -> int:
        return (
            self.embedding + self.head + self.attention + self.norms + self.ffn_experts + self.zero_computation
            + self.router + self.pathway
        )  # fmt: skip


def parameters(s: Shape) -> Parameters:
    """Parameters of a model; a vanilla shape has neither zero-computation experts nor a gating residual."""
    d, n, layers = s.d_model, s.experts.total, s.layers
    pathway = n * n * (layers - 1) if s.experts.zero_computation else 0
    return Parameters(
        embedding=s.vocabulary * d,
        head=s.vocabulary * d,
        attention=4 * d * d * layers,
        norms=(2 * layers + 1) * d,
        ffn_experts=expert_parameters(s) * s.experts.ffn * layers,
        zero_computation=3 * d * s.experts.constant * layers,
        router=n * d * layers,
        pathway=pathway,
    )


def expert_parameters(s: Shape) -> int:
    """Parameters of one FFN expert: three d x h matrices."""
    return 3 * s.d_model * s.d_expert


def activated_parameters(s: Shape, embeddings: int = 1) -> int:
    """Parameters that one token uses: K experts, attention, norms, the vanilla router and ``embeddings`` of the two big matrices."""
    p = parameters(s.vanilla())
    return s.k * expert_parameters(s) * s.layers + p.attention + p.norms + p.router + embeddings * p.embedding


def expert_flops_per_token(s: Shape, tau: float | None = None) -> float:
    """Forward FLOPs of the FFN experts per token and model; ``tau`` None is the vanilla model, where every pick is an FFN."""
    share = 1.0 if tau is None else s.rho(tau)
    return 6.0 * s.d_model * s.d_expert * s.k * s.layers * share


def zero_computation_flops_per_token(s: Shape) -> float:
    """Forward FLOPs of all zero-computation experts per token and layer, evaluated densely: W_c·x and the mix."""
    return 4.0 * s.d_model * s.experts.constant + 2.0 * s.d_model * (1 + s.experts.constant)
