"""Importance of tokens: the attention matrix as a directed graph and votes on it (WPR), aggregated over heads (EIR, VHF).

Legend: B images, H heads, N tokens, P prefix tokens (class token first), n = N - P patches. Scores are float32 of mean 1 over all N
tokens: A is row-stochastic, so Aᵀ keeps their sum, and the variances that VHF looks at do not depend on N's scale.
This is the plain reference; :mod:`papers.zero_tprune.kernels` computes the same on CUDA without storing A.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Softmax attention [B, H, N, N] in float32 from queries and keys [B, H, N, d]; rows are queries and sum to 1."""
    return ((q.float() * scale) @ k.float().transpose(-2, -1)).softmax(dim=-1)


def start_weights(tokens: int, readers: int) -> tuple[float, float]:
    """Weight before the first vote of the first ``readers`` tokens and of the others: sqrt(N) to 1, mean 1."""
    light = tokens / (readers * math.sqrt(tokens) + tokens - readers)
    return math.sqrt(tokens) * light, light


def start_vector(tokens: int, readers: int, device: torch.device | str = "cpu") -> Tensor:
    """Scores before the first vote [N]: the first ``readers`` tokens weigh sqrt(N) times the others (0: all the same), mean 1."""
    heavy, light = start_weights(tokens, readers)
    s = torch.full((tokens,), light, device=device)
    s[:readers] = heavy
    return s


def wpr(a: Tensor, s: Tensor, iterations: int) -> Tensor:
    """Weighted page rank: ``iterations`` votes s ← Aᵀ s.

    A token gathers the attention that it *receives*, weighted by the importance of the tokens that pay it. (A s, the transposition
    error, tends to a constant vector, because the rows of A sum to 1.)

    Args:
        a: attention [..., N, N], rows are queries.
        s: start vector, broadcastable to [..., N].

    Returns:
        Scores [..., N] with the sum of ``s``.
    """
    s = s.expand(a.shape[:-1])
    for _ in range(iterations):
        s = (s[..., None, :] @ a)[..., 0, :]  # a row vector times A: Aᵀ s
    return s


def head_mask(s: Tensor, prefix: int, vhf: tuple[float, float] | None, scale: str = "mean1") -> Tensor:
    """Heads that the variance filter lets pass [B, H]; all of them where none would.

    The population variance over patch tokens must lie within the bounds. With ``scale="sum1"`` scores are divided by N first; the
    variance is then below 1/N and the paper's bounds filter every head.
    """
    if vhf is None:
        return torch.ones(s.shape[:-1], dtype=torch.bool, device=s.device)
    patches = s[..., prefix:] / (s.shape[-1] if scale == "sum1" else 1)
    variance = patches.var(dim=-1, correction=0)
    inside = (variance >= vhf[0]) & (variance <= vhf[1])
    return inside | ~inside.any(dim=-1, keepdim=True)


def over_heads(s: Tensor, mask: Tensor, heads: str = "rms") -> Tensor:
    """Importance [B, N] from scores [B, H, N]: root mean square (EIR) or mean over the heads of ``mask`` [B, H]."""
    weight = mask.to(s.dtype)[..., None]
    count = weight.sum(dim=-2)
    if heads == "mean":
        return (s * weight).sum(dim=-2) / count
    return ((s.square() * weight).sum(dim=-2) / count).sqrt()
