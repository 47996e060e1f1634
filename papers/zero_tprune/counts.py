"""Exact operation counts in the authors' convention (fvcore): one multiply-accumulate is *one* FLOP, LayerNorm is 5 per element.

Softmax, GELU, biases, residuals, sorting and gathering count nothing. The paper mixes two totals: ``blocks`` (DeiT-S 4.55 G, its
tables) leaves out patch embedding, final norm and head, ``model`` (4.61 G) has them. Everything here returns integers of MAC per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from papers.zero_tprune.plans import ATS, EViT, Layer, Plan, Rule, Schedule, ToMe
from papers.zero_tprune.shape import Shape
from shared.errors import UserError, unknown

Convention: TypeAlias = Literal["model", "blocks"]
CONVENTIONS = ("model", "blocks")
LAYER_NORM = 5  # fvcore's operations per normalised element


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image in the authors' convention (1 MAC = 1 FLOP)."""

    blocks: int
    rest: int  # patch embedding, final norm, pooling, head
    pruning: int  # votes and matching

    def total(self, convention: Convention = "model") -> int:
        """Encoder and pruning, with (``model``) or without (``blocks``) everything outside the blocks."""
        if convention not in CONVENTIONS:
            raise unknown("FLOPs convention", convention, CONVENTIONS)
        return self.blocks + self.pruning + (self.rest if convention == "model" else 0)


def block_flops(shape: Shape, tokens: int, mlp_tokens: int | None = None) -> int:
    """One block on ``tokens`` tokens; ``mlp_tokens`` reach the MLP where a method removes some in between (ToMe, EViT)."""
    after = tokens if mlp_tokens is None else mlp_tokens
    attention_linear = 4 * shape.dim * shape.attention_dim
    attention_norm = shape.block_norm - shape.dim  # the norm before the MLP sees what the MLP sees
    return (
        tokens * attention_linear
        + 2 * tokens * tokens * shape.attention_dim
        + after * (shape.block_linear - attention_linear)
        + LAYER_NORM * (tokens * attention_norm + after * shape.dim)
    )


def rest_flops(shape: Shape, last_tokens: int) -> int:
    """Everything outside the blocks; ``last_tokens`` leave the last block."""
    norm = LAYER_NORM * (last_tokens * shape.final_norm + shape.pooled_norm)
    return shape.embed + norm + last_tokens * shape.pool_token + shape.pool_fixed + shape.head


def matching_flops(shape: Shape, patches: int, rule: Rule) -> int:
    """Similarities of the S-stage: |A| · |B| · width of the feature."""
    width = {"key_mean": shape.head_dim, "x": shape.dim}.get(rule.feature, shape.attention_dim)
    pairs = patches * (patches - 1) // 2 if rule.partition == "none" else (patches // 2) * (patches - patches // 2)
    return pairs * width


def layer_flops(shape: Shape, layer: Layer, patches: int, rule: Rule) -> int:
    """Votes (N² per head and vote) and matching of one pruning layer on ``patches`` patches."""
    left = layer.kept(patches)
    if left == patches or rule.method in ("random", "truncate", "cls"):
        return 0  # the class token's row is attention that the block has computed anyway
    tokens = patches + shape.prefix
    vote = shape.heads * tokens * tokens
    if rule.order == "i":
        return layer.iterations * vote
    if rule.order == "s":
        return vote + matching_flops(shape, patches, rule)
    if rule.order == "is":
        between = patches - (patches - layer.dropped(patches) - left)
        return layer.iterations * vote + matching_flops(shape, between, rule)
    first = vote if rule.order == "isi" else 0
    total = first + matching_flops(shape, patches, rule) if layer.drop else 0
    if left < patches - layer.dropped(patches):
        survivors = tokens - layer.dropped(patches)
        total += layer.iterations * shape.heads * survivors * survivors
    return total


def flops(shape: Shape, plan: Plan | None = None) -> Flops:
    """FLOPs of one image under a plan (``None``: unpruned). Pruning work is counted; ATS has no fixed count, see :func:`flops_of_counts`.

    Raises:
        UserError: a plan that does not fit the model.
    """
    if plan is None:
        plan = Schedule(())
    if isinstance(plan, ATS):
        raise UserError(
            "ATS keeps a different number of tokens for every image: count its recorded tokens with flops_of_counts"
        )
    counts = plan.patches(shape.depth, shape.patches)
    inside = isinstance(plan, ToMe | EViT)
    result = flops_of_counts(shape, counts, inside=inside)
    if isinstance(plan, Schedule):
        places = {layer.after: layer for layer in plan.layers}
        pruning = sum(layer_flops(shape, layer, counts[after - 1], plan.rule) for after, layer in places.items())
        return Flops(result.blocks, result.rest, pruning)
    if isinstance(plan, ToMe):  # half of the patches against the other half, keys averaged over heads
        pairs = sum((n // 2) * (n - n // 2) for n, r in zip(counts, plan.merge, strict=False) if r)
        return Flops(result.blocks, result.rest, pairs * shape.head_dim)
    return result


def flops_of_counts(shape: Shape, patches: Sequence[int], *, inside: bool) -> Flops:
    """FLOPs from the patches that enter each block and leave the last; ``inside``: they leave between attention and MLP."""
    if len(patches) != shape.depth + 1:
        raise ValueError(f"{len(patches)} counts for {shape.depth} blocks: give one per block and one for the end")
    tokens = [count + shape.prefix for count in patches]
    blocks = sum(block_flops(shape, tokens[i], tokens[i + 1] if inside else None) for i in range(shape.depth))
    return Flops(blocks, rest_flops(shape, tokens[-1]), 0)


def share(shape: Shape, plan: Plan | None, convention: Convention = "blocks") -> float:
    """FLOPs of a plan as a share of the unpruned model's."""
    return flops(shape, plan).total(convention) / flops(shape).total(convention)
