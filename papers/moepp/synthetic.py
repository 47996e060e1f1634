"""Exact synthetic routing for timing: the FFN share is rho to within one assignment per expert, at any tau.

An untrained router spreads its picks evenly over all N experts whatever tau is, and sampling two experts without replacement biases
the share; here the counts are fixed first and only the tokens are shuffled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from papers.moepp.routing import Experts
from shared.errors import UserError


def expert_counts(tokens: int, k: int, experts: Experts, tau: float) -> list[int]:
    """Assignments of each expert: K·T in all, proportional to 1/eta, whole numbers by largest remainder.

    Raises:
        UserError: an expert would get more assignments than there are tokens.
    """
    weights = [1.0 / eta for eta in experts.eta(tau)]
    exact = [k * tokens * weight / sum(weights) for weight in weights]
    counts = [int(value + 1e-9) for value in exact]
    largest = sorted(range(experts.total), key=lambda i: (counts[i] - exact[i], i))
    for index in largest[: k * tokens - sum(counts)]:
        counts[index] += 1
    if max(counts) > tokens:
        raise UserError(
            f"tau={tau} asks one expert for {max(counts)} of {tokens} tokens: use a larger tau or more experts"
        )
    return counts


def exact_routing(tokens: int, k: int, experts: Experts, tau: float, *, seed: int = 0) -> Tensor:
    """Expert ids [T, K] (int64), the K of a token all different: token t takes positions t, t + T, … of the sorted list of ids."""
    counts = torch.tensor(expert_counts(tokens, k, experts, tau))
    ids = torch.repeat_interleave(torch.arange(experts.total), counts).view(k, tokens).t()
    return ids[torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))].contiguous()
