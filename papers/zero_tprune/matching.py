"""The S-stage: drop the tokens that most resemble a more important one.

Legend: B images, n patches, a and b the sizes of the groups A (loses tokens) and B. Ties go to the lower index, in every step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rank_order(importance: Tensor) -> Tensor:
    """Patch indices [B, n] from most to least important; stable."""
    return importance.argsort(dim=-1, descending=True, stable=True)


def groups(order: Tensor, partition: str, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Split patches into the group that loses tokens and the one that they are compared with.

    Args:
        order: patch indices [B, n] from most to least important.
        partition: ``seq_u`` prunes the unimportant half, ``seq_i`` the important one; ``alternate`` every second token of the image,
            ``random`` a random half.

    Returns:
        Indices of A [B, floor(n/2)] and of B [B, ceil(n/2)].
    """
    n = order.shape[-1]
    half = n // 2
    if partition == "seq_u":
        return order[:, n - half :], order[:, : n - half]
    if partition == "seq_i":
        return order[:, :half], order[:, half:]
    if partition == "alternate":
        index = torch.arange(n, device=order.device).expand_as(order)
        return index[:, 1::2], index[:, ::2]
    shuffled = torch.rand(order.shape, generator=generator).to(order.device).argsort(dim=-1)
    return shuffled[:, :half], shuffled[:, half:]


def similarity(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """Similarity [B, a, b] of features [B, a, d] and [B, b, d]; distances count negative."""
    x, y = x.float(), y.float()
    if metric == "cos":
        return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).transpose(-2, -1)
    if metric == "dot":
        return x @ y.transpose(-2, -1)
    return -torch.cdist(x, y, p=1.0 if metric == "l1" else 2.0)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, m] of ``x`` [B, n, d]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def duplicates(
    feature: Tensor, order: Tensor, drop: int, partition: str, metric: str, generator: torch.Generator | None = None
) -> Tensor:
    """Indices [B, drop] of the patches that the S-stage removes.

    Args:
        feature: what is compared [B, n, d].
        order: patch indices [B, n] from most to least important.
        drop: at most floor(n/2).
        partition: see :func:`groups`; ``none`` compares every token with all more important ones.
    """
    if partition == "none":
        ranked = take(feature, order)
        sim = similarity(ranked, ranked, metric)
        n = order.shape[-1]
        earlier = torch.ones(n, n, dtype=torch.bool, device=sim.device).tril(-1)
        losing, best = order, sim.masked_fill(~earlier, -torch.inf).amax(dim=-1)
    else:
        losing, winning = groups(order, partition, generator)
        best = similarity(take(feature, losing), take(feature, winning), metric).amax(dim=-1)
    return losing.gather(1, best.argsort(dim=-1, descending=True, stable=True)[:, :drop])
