"""Which tokens survive a pruning layer: I' → S → I (Sec. 3) and the other rules, in plain torch.

Legend: B images, H heads, N tokens, P prefix tokens, n = N - P patches, d head width. Indices are rows of the block's output, prefix
tokens first, in their original order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from papers.zero_tprune import importance as imp
from papers.zero_tprune.inside import class_row
from papers.zero_tprune.matching import duplicates, rank_order, take
from papers.zero_tprune.plans import Layer, Rule


@dataclass(frozen=True)
class Tokens:
    """What a block has just computed: q, k, v [B, H, N, d] and its output x [B, N, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    x: Tensor
    scale: float  # of the logits q·kᵀ
    prefix: int
    readers: int  # leading tokens that the head reads

    @property
    def patches(self) -> int:
        return self.x.shape[1] - self.prefix


def start_readers(rule: Rule, readers: int) -> int:
    """How many leading tokens start with more weight."""
    return readers if rule.start in ("auto", "cls") else 0


def select(tokens: Tokens, layer: Layer, rule: Rule) -> Tensor:
    """Rows of x [B, P + m] that survive ``layer``."""
    left = layer.kept(tokens.patches)
    images, device = tokens.x.shape[0], tokens.x.device
    if rule.method == "truncate":
        return torch.arange(tokens.prefix + left, device=device).expand(images, -1)
    if rule.method == "random":
        return _survivors(random_scores(tokens, layer, rule), left, tokens.prefix)
    if rule.method == "cls":
        return _survivors(cls_attention(tokens), left, tokens.prefix)
    return _zero_tprune(tokens, layer, rule, left)


def cls_attention(tokens: Tokens) -> Tensor:
    """Attention that the class token pays to each patch [B, n], mean over heads."""
    return class_row(tokens.q, tokens.k, tokens.scale)[:, tokens.prefix :]


def random_scores(tokens: Tokens, layer: Layer, rule: Rule) -> Tensor:
    """Uniform scores [B, n], the same for the same seed, batch and device."""
    device = tokens.x.device
    generator = torch.Generator(device=device).manual_seed(rule.seed * 1000 + layer.after)
    return torch.rand(tokens.x.shape[0], tokens.patches, generator=generator, device=device)


def _zero_tprune(tokens: Tokens, layer: Layer, rule: Rule, left: int) -> Tensor:
    n, prefix = tokens.patches, tokens.prefix
    a = imp.attention(tokens.q, tokens.k, tokens.scale / rule.tau)
    everyone = torch.arange(n + prefix, device=a.device).expand(a.shape[0], -1)
    drop = layer.dropped(n)
    if rule.order == "i":
        return _survivors(scores(a, everyone, tokens, rule, layer.iterations), left, prefix)
    if rule.order == "s":
        first = scores(a, everyone, tokens, rule, 1)
        return after_s(tokens, layer, rule, everyone, first, min(n - left, n // 2))
    if rule.order == "is":
        full = scores(a, everyone, tokens, rule, layer.iterations)
        index = _survivors(full, left + drop, prefix)
        remaining = full.gather(1, index[:, prefix:] - prefix)
        return after_s(tokens, layer, rule, index, remaining, drop)
    index = everyone
    if drop:
        first = (
            scores(a, everyone, tokens, rule, 1) if rule.order == "isi" else torch.zeros(a.shape[0], n, device=a.device)
        )
        index = after_s(tokens, layer, rule, everyone, first, drop)
    if left < n - drop:
        index = index.gather(1, _survivors(scores(a, index, tokens, rule, layer.iterations), left, prefix))
    return index


def scores(a: Tensor, index: Tensor, tokens: Tokens, rule: Rule, iterations: int) -> Tensor:
    """Importance [B, m] of the patches among the rows ``index`` [B, P + m]: WPR on the sub-graph, VHF, EIR."""
    s = head_scores(a, index, tokens, rule, iterations)
    mask = imp.head_mask(s, tokens.prefix, rule.vhf, rule.vhf_scale)
    return imp.over_heads(s, mask, rule.heads)[:, tokens.prefix :]


def head_scores(a: Tensor, index: Tensor, tokens: Tokens, rule: Rule, iterations: int) -> Tensor:
    """WPR scores per head [B, H, P + m] on the rows and columns ``index`` of A."""
    m = index.shape[-1]
    if m < a.shape[-1]:
        a = a.gather(2, index[:, None, :, None].expand(-1, a.shape[1], -1, a.shape[3]))
        a = a.gather(3, index[:, None, None, :].expand(-1, a.shape[1], m, -1))
        if rule.renormalise:
            a = a / a.sum(dim=-1, keepdim=True)
    s = imp.wpr(a, imp.start_vector(m, start_readers(rule, tokens.readers), a.device), iterations)
    return s if rule.renormalise else s * (m / s.sum(dim=-1, keepdim=True))


def after_s(tokens: Tokens, layer: Layer, rule: Rule, index: Tensor | None, importance: Tensor, drop: int) -> Tensor:
    """``index`` (all rows if None) without the ``drop`` duplicates among its patches; ``importance`` [B, m] gives their order."""
    prefix = tokens.prefix
    if index is None:
        index = torch.arange(tokens.x.shape[1], device=importance.device).expand(importance.shape[0], -1)
    if not drop:
        return index
    generator = torch.Generator().manual_seed(rule.seed * 1000 + layer.after) if rule.partition == "random" else None
    feature = take(features(tokens, rule.feature), index[:, prefix:])
    gone = duplicates(feature, rank_order(importance), drop, rule.partition, rule.metric, generator)
    score = torch.zeros_like(importance).scatter(1, gone, -1.0)
    return index.gather(1, _survivors(score, importance.shape[1] - drop, prefix))


def features(tokens: Tokens, name: str) -> Tensor:
    """What the S-stage compares, for all tokens [B, N, width]."""
    if name == "x":
        return tokens.x
    if name == "key_mean":
        return tokens.k.mean(dim=1)
    source: Any = {"key_concat": tokens.k, "query": tokens.q, "value": tokens.v}[name]
    return source.transpose(1, 2).flatten(2)


def _survivors(score: Tensor, left: int, prefix: int) -> Tensor:
    """Rows of the prefix and of the ``left`` patches of highest score [B, n], in original order."""
    best = rank_order(score)[:, :left].sort(dim=-1).values + prefix
    front = torch.arange(prefix, device=score.device).expand(score.shape[0], -1)
    return torch.cat([front, best], dim=1)
