"""The MoE layer of M³ViT (Sec. 3.1, Eq. 2–7): routers per task, experts, three execution orders, balance loss.

A layer sees G groups of S tokens. A group is one task with its own router (or its own task vector); the experts are shared by all
groups, so the tokens of all groups queue for them together. Shape letters: G groups, S tokens of a group, D model width, h hidden
width of an expert, N experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.m3vit.dispatch import combine, lay_out, sort_by_expert
from shared.errors import unknown


class Routing(NamedTuple):
    """What a router decided for G groups of S tokens."""

    probs: Tensor  # (G, S, N) softmax over all experts
    gates: Tensor  # (G, S, K) the K largest of them, not renormalised
    experts: Tensor  # (G, S, K) int64, best first
    load: Tensor | None  # (G, N) expected tokens per expert under router noise; None without noise

    def counts(self) -> Tensor:
        """Tokens per expert (G, N)."""
        return _sum_by_expert(torch.ones_like(self.gates), self.experts, self.probs.shape[-1])


def route(logits: Tensor, top_k: int, noise_std: float = 0.0) -> Routing:
    """Eq. 2–5: softmax over all N logits (G, S, N), the ``top_k`` largest kept as they are.

    ``noise_std`` is the standard deviation of the Gaussian added to the logits. With noise, the load of an expert is the sum over
    tokens of the probability that it stays among the top K if its own noise were drawn anew (Shazeer et al. 2017, App. A).
    """
    num_experts = logits.shape[-1]
    noisy = logits + noise_std * torch.randn_like(logits) if noise_std > 0 else logits
    probs = noisy.softmax(-1)
    gates, experts = probs.topk(top_k, dim=-1)
    load = None
    if noise_std > 0 and top_k < num_experts:
        ranked = noisy.topk(top_k + 1, dim=-1).values
        kth, next_one = ranked[..., top_k - 1 : top_k], ranked[..., top_k : top_k + 1]
        threshold = torch.where(noisy > next_one, next_one, kth)
        load = torch.special.ndtr((logits - threshold) / noise_std).sum(1)
    return Routing(probs, gates, experts, load)


def _sum_by_expert(values: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Sum of ``values`` (G, S, K) per chosen expert: (G, N)."""
    return values.new_zeros(len(values), num_experts).scatter_add(1, experts.flatten(1), values.flatten(1))


def cv_squared(z: Tensor) -> Tensor:
    """Squared coefficient of variation along the last axis: unbiased variance over squared mean."""
    return z.var(-1) / (z.mean(-1) ** 2 + 1e-10)


def balance_loss(routing: Routing) -> Tensor:
    """CV²(importance) + CV²(load), summed over groups; importance is the sum of the gates that an expert received.

    Without noise the load is the number of tokens, which has no gradient: only importance trains then.
    """
    load = routing.counts() if routing.load is None else routing.load
    importance = _sum_by_expert(routing.gates, routing.experts, routing.probs.shape[-1])
    return (cv_squared(importance) + cv_squared(load)).sum()


class Router(nn.Module):
    """One matrix G_i of (D, N) per task, no bias. ``num_routers=1`` is the paper's *single* router, one per task is *multi*."""

    def __init__(self, dim: int, num_experts: int, num_routers: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_routers, dim, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(±1/√N), as the authors' code."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """Logits (G, S, N) of tokens (G, S, D) of the given tasks; ``None`` stands for one group before tasks exist."""
        if tasks is None or len(self.weight) == 1:
            return torch.matmul(x, self.weight[:1])
        return torch.bmm(x, self.weight[list(tasks)])

    @torch.no_grad()
    def share_first(self) -> None:
        """Start every task from router 0, as after pre-training, which knows no tasks."""
        self.weight.copy_(self.weight[:1].expand_as(self.weight))


class TaskEmbedding(nn.Module):
    """t_i = ReLU(MLP(one-hot e_i)) with two layers of 64 (Eq. 7, Supp. A.1), one for all MoE layers."""

    def __init__(self, num_tasks: int, dim: int = 64) -> None:
        super().__init__()
        self.num_tasks, self.dim = num_tasks, dim
        self.mlp = nn.Sequential(nn.Linear(num_tasks, dim), nn.GELU(), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, tasks: Sequence[int]) -> Tensor:
        """Task vectors (G, 64)."""
        parameter = next(self.parameters())
        one_hot = torch.eye(self.num_tasks, dtype=parameter.dtype, device=parameter.device)[list(tasks)]
        vectors: Tensor = self.mlp(one_hot)
        return vectors


class TaskConditionedRouter(nn.Module):
    """One router on [x ; t_i] (Eq. 6). The product with the concatenation is split in two: t_i is the same for all tokens."""

    def __init__(self, dim: int, num_experts: int, embedding: TaskEmbedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.weight = nn.Parameter(torch.empty(dim, num_experts))
        self.task_weight = nn.Parameter(torch.empty(embedding.dim, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(±1/√N), as :class:`Router`."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.task_weight, -bound, bound)

    def forward(self, x: Tensor, tasks: Sequence[int] | None) -> Tensor:
        """As :meth:`Router.forward`; ``None`` leaves the task vector out."""
        logits = torch.matmul(x, self.weight[None])
        if tasks is None:
            return logits
        return logits + (self.embedding(tasks) @ self.task_weight)[:, None]


class Experts(nn.Module):
    """N small MLPs f_e(x) = W2_e·gelu(W1_e x + b1_e) + b2_e. The orders below take tokens (S, D), gates (S, K), chosen experts (S, K)."""

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.weight1 = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.bias1 = nn.Parameter(torch.empty(num_experts, hidden))
        self.weight2 = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.bias2 = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(±1/√fan_in). The authors' FastMoE layers start at 1/√(in·out), as if the MLP were missing, and are pre-trained."""
        for weight, bias in ((self.weight1, self.bias1), (self.weight2, self.bias2)):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def token_by_token(self, x: Tensor, gates: Tensor, index: Tensor) -> Tensor:
        """Each token fetches its K experts: the order that the paper starts from, and the reference for the others."""
        rows = []
        for token, gate, chosen in zip(x, gates, index, strict=True):
            hidden = F.gelu(self.weight1[chosen] @ token + self.bias1[chosen])
            rows.append(gate @ (torch.bmm(self.weight2[chosen], hidden[..., None])[..., 0] + self.bias2[chosen]))
        return torch.stack(rows)

    def expert_by_expert(self, x: Tensor, gates: Tensor, index: Tensor) -> Tensor:
        """The paper's reordering (Sec. 3.2): every non-empty expert is fetched once and works off its queue of tokens."""
        queues = sort_by_expert(index, len(self.weight1))
        out, scores, top_k = torch.zeros_like(x), gates.flatten(), index.shape[-1]
        start = 0
        for e, end in enumerate(queues.ends.tolist()):
            if start < end:
                pairs = queues.order[start:end]
                tokens = pairs // top_k
                hidden = F.gelu(F.linear(x[tokens], self.weight1[e], self.bias1[e]))
                out = out.index_add(0, tokens, scores[pairs, None] * F.linear(hidden, self.weight2[e], self.bias2[e]))
            start = end
        return out

    def grouped(self, x: Tensor, gates: Tensor, index: Tensor) -> Tensor:
        """The reordering with one sort, one grouped product per layer, and one gather back: for speed."""
        rows = lay_out(index, len(self.weight1), x)
        return combine(rows.mlp(x, (self.weight1, self.bias1, self.weight2, self.bias2)), gates, rows)


ORDERS: dict[str, Callable[[Experts, Tensor, Tensor, Tensor], Tensor]] = {
    "token_by_token": Experts.token_by_token,
    "expert_by_expert": Experts.expert_by_expert,
    "grouped": Experts.grouped,
}


class MoE(nn.Module):
    """Router and experts, in place of a transformer block's MLP.

    ``noise`` is the paper's σ: in training the logits get N(0, (σ/N)²). ``order`` names one of :data:`ORDERS`.
    """

    def __init__(
        self,
        experts: Experts,
        router: Router | TaskConditionedRouter,
        top_k: int,
        noise: float = 0.0,
        order: str = "grouped",
    ) -> None:
        super().__init__()
        self.experts = experts
        self.router = router
        self.top_k = top_k
        self.noise = noise
        self.order = order

    def forward(self, x: Tensor, tasks: Sequence[int] | None) -> tuple[Tensor, Routing]:
        """Tokens (G, S, D), already normalised, of G tasks -> y (G, S, D) and the routing.

        ``tasks`` are G task numbers, ``None`` for one group without a task. Raises UserError for an unknown ``order``.
        """
        if self.order not in ORDERS:
            raise unknown("execution order", self.order, ORDERS)
        num_experts = len(self.experts.weight1)
        routing = route(self.router(x, tasks), self.top_k, self.noise / num_experts if self.training else 0.0)
        y = ORDERS[self.order](
            self.experts, x.flatten(0, 1), routing.gates.flatten(0, 1), routing.experts.flatten(0, 1)
        )
        return y.view_as(x), routing
