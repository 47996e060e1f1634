"""The MoE layer of M³ViT (Sec. 3.1, Eq. 2–7): routers per task, experts, three execution orders, balance loss.

A layer sees G groups of S tokens. A group is one task with its own router (or its own task vector); the experts are shared by all
groups, so the tokens of all groups queue for them together. Shape letters: G groups, S tokens of a group, D model width, h hidden
width of an expert, N experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from shared.errors import unknown


class Routing(NamedTuple):
    """What a router decided for G groups of S tokens."""

    probs: Tensor  # (G, S, N) softmax over all experts
    gates: Tensor  # (G, S, K) the K largest of them, not renormalised
    experts: Tensor  # (G, S, K) int64, best first
    load: Tensor  # (G, N) tokens per expert; with router noise the expectation, which has a gradient


def route(logits: Tensor, top_k: int, noise_std: float = 0.0) -> Routing:
    """Eq. 2–5: softmax over all N logits (G, S, N), the ``top_k`` largest kept as they are.

    ``noise_std`` is the standard deviation of the Gaussian added to the logits. With noise, the load of an expert is the sum over
    tokens of the probability that it stays among the top K if its own noise were drawn anew (Shazeer et al. 2017, App. A).
    """
    num_experts = logits.shape[-1]
    noisy = logits + noise_std * torch.randn_like(logits) if noise_std > 0 else logits
    probs = noisy.softmax(-1)
    gates, experts = probs.topk(top_k, dim=-1)
    if noise_std > 0 and top_k < num_experts:
        ranked = noisy.topk(top_k + 1, dim=-1).values
        kth, next_one = ranked[..., top_k - 1 : top_k], ranked[..., top_k : top_k + 1]
        threshold = torch.where(noisy > next_one, next_one, kth)
        load = torch.special.ndtr((logits - threshold) / noise_std).sum(1)
    else:
        load = _sum_by_expert(torch.ones_like(gates), experts, num_experts)
    return Routing(probs, gates, experts, load)


def _sum_by_expert(values: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """Sum of ``values`` (G, S, K) per chosen expert: (G, N)."""
    return values.new_zeros(len(values), num_experts).scatter_add(1, experts.flatten(1), values.flatten(1))


def cv_squared(z: Tensor) -> Tensor:
    """Squared coefficient of variation along the last axis: unbiased variance over squared mean."""
    return z.var(-1) / (z.mean(-1) ** 2 + 1e-10)


def balance_loss(routing: Routing) -> Tensor:
    """CV²(importance) + CV²(load), summed over groups; importance is the sum of the gates that an expert received."""
    importance = _sum_by_expert(routing.gates, routing.experts, routing.probs.shape[-1])
    return (cv_squared(importance) + cv_squared(routing.load)).sum()


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
        self.num_tasks = num_tasks
        self.mlp = nn.Sequential(nn.Linear(num_tasks, dim), nn.GELU(), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, tasks: Sequence[int]) -> Tensor:
        """Task vectors (G, 64)."""
        weight = self.mlp[0].weight
        one_hot = F.one_hot(torch.tensor(tasks, device=weight.device), self.num_tasks)
        vectors: Tensor = self.mlp(one_hot.to(weight.dtype))
        return vectors


class TaskConditionedRouter(nn.Module):
    """One router on [x ; t_i] (Eq. 6). The product with the concatenation is split in two: t_i is the same for all tokens."""

    def __init__(self, dim: int, num_experts: int, embedding: TaskEmbedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.weight = nn.Parameter(torch.empty(dim, num_experts))
        self.task_weight = nn.Parameter(torch.empty(embedding.mlp[0].out_features, num_experts))
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


class Queues(NamedTuple):
    """Token-expert pairs (numbered token·K + slot) sorted by expert."""

    order: Tensor  # (S·K,) pair at each sorted place
    place: Tensor  # (S·K,) sorted place of each pair
    expert: Tensor  # (S·K,) expert at each sorted place
    ends: Tensor  # (N,) int32, end of each expert's queue


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


def _sum_rows(table: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """Rows ``table[index]`` (S, K, D), weighted (S, K), summed over K: (S, D)."""
    if table.device.type == "meta":  # operators that any counter knows
        rows = table.index_select(0, index.flatten()).view(*index.shape, -1)
        return (rows if weight is None else rows * weight[..., None]).sum(1)
    return F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")  # one pass, 10 times faster on a CPU


class _Dispatch(torch.autograd.Function):
    """Copies tokens (S, D) into the queues (S·K, D). The gradient is a sum of gathered rows, where autograd would scatter."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _sum_rows(grad.contiguous(), place), None, None


class _Combine(torch.autograd.Function):
    """Sums each token's rows of the queues (S·K, D), weighted with its gates (S, K): (S, D)."""

    @staticmethod
    def forward(ctx: FunctionCtx, y: Tensor, gates: Tensor, tokens: Tensor, place: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(y, gates, tokens, place, order)
        return _sum_rows(y, place, gates)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        y, gates, tokens, place, order = ctx.saved_tensors  # type: ignore[attr-defined]
        spread = grad.index_select(0, tokens)
        grad_gates = torch.linalg.vecdot(y, spread).index_select(0, place.flatten()).view_as(gates)
        return spread * gates.flatten().index_select(0, order)[:, None], grad_gates, None, None, None


class _QueuedLinear(torch.autograd.Function):
    """A linear layer per queue: rows of ``x`` (M, in) times ``weight`` (N, out, in), written in place, nothing padded."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts  # type: ignore[attr-defined]
        out = x.new_empty(len(x), weight.shape[1])
        for x_e, out_e, weight_e, bias_e in zip(x.split(counts), out.split(counts), weight, bias, strict=True):
            torch.addmm(bias_e, x_e, weight_e.t(), out=out_e)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors  # type: ignore[attr-defined]
        counts: list[int] = ctx.counts  # type: ignore[attr-defined]
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[:2])
        parts = zip(x.split(counts), grad.split(counts), grad_x.split(counts), range(len(counts)), strict=True)
        for x_e, grad_e, grad_x_e, e in parts:
            torch.mm(grad_e, weight[e], out=grad_x_e)
            torch.mm(grad_e.t(), x_e, out=grad_weight[e])
            torch.sum(grad_e, 0, out=grad_bias[e])
        return grad_x, grad_weight, grad_bias, None


def _balanced_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same cost with static shapes, for meta tensors, which carry no routing: queues as equal as M rows over N experts allow."""
    short, longer = divmod(len(x), len(weight))
    parts = []
    for rows, first, last in ((short + 1, 0, longer), (short, longer, len(weight))):
        if rows and first < last:
            queue = x[: rows * (last - first)].view(last - first, rows, -1)
            product = torch.baddbmm(bias[first:last, None], queue, weight[first:last].transpose(1, 2))
            parts.append(product.view(-1, weight.shape[1]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def queued_linear(x: Tensor, weight: Tensor, bias: Tensor, queues: Queues) -> Tensor:
    """Rows ``x`` (M, in), sorted into queues, times their expert's ``weight`` (N, out, in) plus ``bias`` (N, out): (M, out)."""
    if x.device.type == "meta":
        return _balanced_linear(x, weight, bias)
    if x.device.type == "cuda" and x.dtype != torch.float64:  # one launch; queue lengths never leave the device
        return F.grouped_mm(x, weight.transpose(1, 2), offs=queues.ends) + bias[queues.expert]
    return _QueuedLinear.apply(x, weight, bias, queues.ends.diff(prepend=queues.ends.new_zeros(1)).tolist())


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
        queues = sort_by_expert(index, len(self.weight1))
        tokens, place = queues.order // index.shape[-1], queues.place.view_as(index)
        hidden = F.gelu(queued_linear(_Dispatch.apply(x, tokens, place), self.weight1, self.bias1, queues))
        y = queued_linear(hidden, self.weight2, self.bias2, queues)
        out: Tensor = _Combine.apply(y, gates, tokens, place, queues.order)
        return out


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
