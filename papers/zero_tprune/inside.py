"""The baselines that remove tokens inside a block, between attention and MLP: ToMe, EViT and ATS, written from their descriptions.

They need the attention's class row, a bias on its logits, or a mask, so the block's forward is replaced (and put back by ``remove``).
Attention stays fused. Legend: B images, H heads, N tokens, P prefix tokens, n = N - P patches.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from papers.zero_tprune.matching import take
from papers.zero_tprune.plans import ATS, EViT, ToMe
from shared.errors import UserError


class InsideBlocks:
    """Replaces the forward of every block of a model by one that carries token sizes and a mask."""

    def __init__(self, plan: ToMe | EViT | ATS, model: Any, prefix: int, readers: int) -> None:
        if isinstance(plan, EViT | ATS) and not readers:
            raise UserError(
                f"{type(plan).__name__} ranks by the class token's attention, and this model has no class token"
            )
        if isinstance(plan, ToMe):
            plan.patches(len(model.blocks), 2)  # checks its length
        elif model.global_pool != "token":
            raise UserError(
                f"{type(plan).__name__} needs a head that reads the class token, this one pools by '{model.global_pool}'"
            )
        for block in model.blocks:
            if type(block).__name__ != "Block" or getattr(block.attn, "gate", None) is not None:
                raise UserError(
                    f"{type(plan).__name__} works inside pre-norm blocks, this model has {type(block).__name__}: use a Schedule"
                )
        self.plan, self.prefix = plan, prefix
        self.blocks = list(model.blocks)
        self.size: Tensor | None = None  # [B, N, 1] patches that a token stands for (ToMe)
        self.valid: Tensor | None = None  # [B, N] tokens that exist (ATS)
        self.counts: list[Tensor] = []  # patches per image: into each block, out of the last (ATS)

    def install(self) -> None:
        """Replace the forward of every block."""
        for number, block in enumerate(self.blocks, start=1):
            block.forward = partial(self.forward, block, number)

    def remove(self) -> None:
        """Put the blocks' own forward back."""
        for block in self.blocks:
            block.__dict__.pop("forward", None)

    def forward(
        self, block: Any, number: int, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """A pre-norm block with a change of tokens after its attention."""
        if attn_mask is not None or is_causal:
            raise UserError("an attention mask cannot be combined with pruned tokens")
        if number == 1:
            self.size = self.valid = None
            self.counts = [torch.full((x.shape[0],), x.shape[1] - self.prefix, device=x.device)]
        y, q, k, v = self._attend(block.attn, block.norm1(x))
        x = x + block.drop_path1(block.ls1(y))
        x = self._change(number, x, q, k, v, block.attn.scale)
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))

    def _attend(self, attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        images, tokens, _ = x.shape
        q, k, v = attn.qkv(x).view(images, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = None
        if self.size is not None:
            bias = self.size.log().to(q.dtype)[:, None, None, :, 0]
        if self.valid is not None:
            bias = torch.zeros_like(self.valid, dtype=q.dtype).masked_fill(~self.valid, -torch.inf)[:, None, None]
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.transpose(1, 2).reshape(images, tokens, -1)
        return attn.proj_drop(attn.proj(getattr(attn, "norm", nn.Identity())(y))), q, k, v

    def _change(self, number: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        plan, patches = self.plan, x.shape[1] - self.prefix
        if isinstance(plan, ToMe):
            r = min(plan.merge[number - 1], patches // 2)
            return self._merge(x, k.detach().mean(dim=1), r) if r else x
        if isinstance(plan, EViT):
            if number not in plan.blocks:
                return x
            left = math.ceil(plan.keep * patches - 1e-9)
            best = class_row(q, k, scale)[:, self.prefix :].topk(left, dim=-1).indices.sort(dim=-1).values
            return torch.cat([x[:, : self.prefix], take(x[:, self.prefix :], best)], dim=1)
        return self._sample(number, x, q, k, v, scale)

    def _merge(self, x: Tensor, metric: Tensor, r: int) -> Tensor:
        """Bipartite soft matching: patches alternate into B and A, the r members of A nearest to one of B are averaged into it."""
        size = torch.ones_like(x[..., :1]) if self.size is None else self.size
        metric = nn.functional.normalize(metric[:, self.prefix :].float(), dim=-1)
        best, partner = (metric[:, 1::2] @ metric[:, ::2].transpose(-2, -1)).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)
        gone, stay = order[:, :r], order[:, r:]
        target = partner.gather(1, gone)

        def combine(values: Tensor) -> Tensor:
            patches = values[:, self.prefix :]
            a, b = patches[:, 1::2], patches[:, ::2]
            kept, moved = take(a, stay), take(a, gone)
            b = b.scatter_add(1, target[..., None].expand(-1, -1, values.shape[-1]), moved)
            return torch.cat([values[:, : self.prefix], kept, b], dim=1)

        merged, new_size = combine(x * size), combine(size)
        assert isinstance(self.plan, ToMe)
        self.size = new_size if self.plan.proportional else None
        return merged / new_size

    def _sample(self, number: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Inverse-transform sampling on class attention times norm of the value, with a fixed grid; duplicates leave.

        The batch is as wide as its image with the most survivors; the others are masked.
        """
        assert isinstance(self.plan, ATS)
        patches = x.shape[1] - self.prefix
        if number >= self.plan.first:
            row = class_row(q, k, scale, self.valid)[:, self.prefix :] * v.transpose(1, 2).flatten(2)[
                :, self.prefix :
            ].float().norm(dim=-1)
            index, kept = sample(row, self.plan.samples)
            rows = torch.cat(
                [torch.arange(self.prefix, device=x.device).expand(x.shape[0], -1), index + self.prefix], dim=1
            )
            x = take(x, rows)
            front = torch.ones(x.shape[0], self.prefix, dtype=torch.bool, device=x.device)
            self.valid = torch.cat([front, kept], dim=1)
        alive = patches if self.valid is None else self.valid[:, self.prefix :].sum(dim=-1)
        self.counts.append(torch.as_tensor(alive, device=x.device).expand(x.shape[0]))
        return x


def class_row(q: Tensor, k: Tensor, scale: float, valid: Tensor | None = None) -> Tensor:
    """Attention that the class token pays to every token [B, N], mean over heads, float32."""
    logits = (q[:, :, :1].float() * scale) @ k.float().transpose(-2, -1)
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(dim=-1).mean(dim=1)[:, 0]


def sample(weight: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Where a uniform grid of ``points`` quantiles falls on the distribution ``weight`` [B, n].

    Returns:
        Patch indices [B, m] in order, m = most distinct samples of any image, and which of them are real [B, m].
    """
    cumulative = weight.cumsum(dim=-1)
    grid = (torch.arange(points, device=weight.device, dtype=weight.dtype) + 0.5) / points
    drawn = torch.searchsorted(cumulative / cumulative[:, -1:], grid.expand(weight.shape[0], -1).contiguous())
    hit = torch.zeros_like(weight, dtype=torch.bool).scatter(1, drawn.clamp(max=weight.shape[1] - 1), True)
    widest = int(hit.sum(dim=-1).max())
    index = hit.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :widest]
    return index, hit.gather(1, index)
