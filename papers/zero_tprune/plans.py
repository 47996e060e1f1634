"""What to remove where: schedules of Zero-TPrune and of the methods that it is compared with. Plain data, no torch.

Blocks are numbered from 1, as in the paper. A pruning layer sits *after* its block: the block runs on all its tokens, the next one
sees fewer. Class, distillation and register tokens ("prefix tokens") are never removed and never counted as patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

from shared.errors import UserError, unknown

Method: TypeAlias = Literal["zero_tprune", "random", "cls", "truncate"]
Order: TypeAlias = Literal["isi", "is", "si", "i", "s"]
Partition: TypeAlias = Literal["seq_u", "seq_i", "alternate", "random", "none"]
Feature: TypeAlias = Literal["key_concat", "key_mean", "query", "value", "x"]
Metric: TypeAlias = Literal["cos", "dot", "l1", "l2"]


def floor_share(share: float, count: int) -> int:
    """``floor(share · count)``, safe against a share such as 0.29 that binary floats hold a little too small."""
    return math.floor(share * count + 1e-9)


@dataclass(frozen=True)
class Rule:
    """How tokens are scored and matched; the defaults are the paper's final choice.

    Attributes:
        method: ``zero_tprune``; ``cls`` ranks by the class token's attention (Top-K); ``random`` drops at random; ``truncate`` keeps
            the first tokens and does no work at all (the ceiling of any method with the same counts).
        start: start vector of WPR: ``cls`` gives the tokens that the head reads sqrt(N) times the weight of the others,
            ``uniform`` all the same, ``auto`` is ``cls`` where the model has a class token.
        tau: temperature of the attention that is iterated (1: the model's own).
        heads: root mean square over heads (EIR, ``rms``) or plain ``mean``.
        vhf: bounds of the variance head filter on scores of mean 1; ``None`` switches it off.
        vhf_scale: what the bounds refer to: scores of mean 1, or of sum 1 (the trap: every head is then filtered).
        partition: which half of the importance order loses tokens in the S-stage; ``none`` matches every token with all more
            important ones.
        feature, metric: what is compared in the S-stage, and how.
        order: ``isi`` is I' → S → I. The other orders remove the same number of tokens.
        renormalise: rows of the survivors' sub-matrix sum to 1 again.
        seed: of ``random`` (method or partition).
    """

    method: Method = "zero_tprune"
    start: Literal["auto", "cls", "uniform"] = "auto"
    tau: float = 1.0
    heads: Literal["rms", "mean"] = "rms"
    vhf: tuple[float, float] | None = (0.01, 0.7)
    vhf_scale: Literal["mean1", "sum1"] = "mean1"
    partition: Partition = "seq_u"
    feature: Feature = "key_concat"
    metric: Metric = "cos"
    order: Order = "isi"
    renormalise: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "method": get_args(Method),
            "start": ("auto", "cls", "uniform"),
            "heads": ("rms", "mean"),
            "vhf_scale": ("mean1", "sum1"),
            "partition": get_args(Partition),
            "feature": get_args(Feature),
            "metric": get_args(Metric),
            "order": get_args(Order),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise unknown(name, getattr(self, name), allowed)
        if self.tau <= 0:
            raise UserError(f"tau={self.tau} must be positive")
        if self.vhf is not None and not self.vhf[0] <= self.vhf[1]:
            raise UserError(f"vhf={self.vhf} must be an interval [low, high]")
        if self.order == "si" and self.partition in ("seq_u", "seq_i", "none"):
            raise UserError(
                f"order=si matches before anything is ranked, so partition={self.partition} has no order to go by: "
                "use partition=alternate or random"
            )


@dataclass(frozen=True)
class Layer:
    """One pruning layer.

    ``after`` which block; ``keep``: share of patches that the I-stage keeps; ``drop``: tokens that the S-stage drops; ``iterations``:
    votes of the I-stage.
    """

    after: int
    keep: float = 1.0
    drop: int = 0
    iterations: int = 5

    def __post_init__(self) -> None:
        if self.after < 1:
            raise UserError(f"a pruning layer after block {self.after}: blocks are numbered from 1")
        if not 0.0 < self.keep <= 1.0:
            raise UserError(f"keep={self.keep} after block {self.after} must lie in (0, 1]")
        if self.drop < 0 or self.iterations < 1:
            raise UserError(f"after block {self.after}: drop must be at least 0 and iterations at least 1")

    def dropped(self, patches: int) -> int:
        """Tokens that the S-stage removes: ``drop``, or half of the patches where there are fewer."""
        return min(self.drop, patches // 2)

    def kept(self, patches: int) -> int:
        """Patches that leave this layer: first ``drop`` go, then the I-stage keeps floor(keep · rest); never the last one."""
        return max(1, floor_share(self.keep, patches - self.dropped(patches)))


@dataclass(frozen=True)
class Schedule:
    """Pruning layers and the rule that ranks tokens. Hashable; switch between schedules freely."""

    layers: tuple[Layer, ...]
    rule: Rule = field(default_factory=Rule)

    def __post_init__(self) -> None:
        places = [layer.after for layer in self.layers]
        if places != sorted(set(places)):
            raise UserError(f"pruning layers after blocks {places} must be in order, one per block")

    def with_rule(self, **changes: Any) -> Schedule:
        """The same token counts under another rule."""
        return replace(self, rule=replace(self.rule, **changes))

    def patches(self, depth: int, patches: int) -> tuple[int, ...]:
        """Patches that enter each of ``depth`` blocks, and those that leave the last one (``depth`` + 1 numbers).

        Raises UserError where a layer lies behind the last block.
        """
        places = {layer.after: layer for layer in self.layers}
        late = [after for after in places if after > depth]
        if late:
            raise UserError(f"a pruning layer after block {late[0]}, but the model has {depth} blocks")
        counts = [patches]
        for block in range(1, depth + 1):
            layer = places.get(block)
            counts.append(layer.kept(counts[-1]) if layer else counts[-1])
        return tuple(counts)


@dataclass(frozen=True)
class ToMe:
    """ToMe (Bolya et al., ICLR 2023) off the shelf: merge ``merge[l]`` tokens in block l+1, between attention and MLP.

    ``proportional``: attention logits get + log(token size).
    """

    merge: tuple[int, ...]
    proportional: bool = True

    def patches(self, depth: int, patches: int) -> tuple[int, ...]:
        """Patches that enter each block and those that leave the last; at most half are merged at once."""
        if len(self.merge) != depth:
            raise UserError(
                f"ToMe has {len(self.merge)} merge counts, the model has {depth} blocks: give one per block"
            )
        counts = [patches]
        for r in self.merge:
            counts.append(counts[-1] - min(r, counts[-1] // 2))
        return tuple(counts)


@dataclass(frozen=True)
class EViT:
    """EViT (Liang et al., ICLR 2022) without training and without fusion: keep ceil(keep · n) by the class token's attention.

    Tokens leave between attention and MLP of the blocks in ``blocks``.
    """

    keep: float
    blocks: tuple[int, ...] = (4, 7, 10)

    def patches(self, depth: int, patches: int) -> tuple[int, ...]:
        """Patches that enter each block and those that leave the last."""
        counts = [patches]
        for block in range(1, depth + 1):
            counts.append(math.ceil(self.keep * counts[-1] - 1e-9) if block in self.blocks else counts[-1])
        return tuple(counts)


@dataclass(frozen=True)
class ATS:
    """Adaptive token sampling (Fayyaz et al., ECCV 2022): at most ``samples`` patches survive block ``first`` and each later one.

    How many survive depends on the image: a sharp score gives fewer distinct samples.
    """

    samples: int
    first: int = 4

    def most_patches(self, depth: int, patches: int) -> tuple[int, ...]:
        """The upper bound of patches that enter each block and leave the last."""
        return tuple(patches if block < self.first else min(self.samples, patches) for block in range(depth + 1))


Plan: TypeAlias = Schedule | ToMe | EViT | ATS

# Sec. 3: 30-50 votes in the first three layers, 5-10 in the middle, 1 in the last three (of twelve blocks).
VOTES = {"early": 30, "mid": 5, "late": 1}


def votes(after: int, depth: int, counts: Mapping[str, int] = VOTES) -> int:
    """How often the I-stage after block ``after`` votes: by quarter of the depth."""
    return counts["early"] if after < depth / 4 else counts["late"] if after >= 3 * depth / 4 else counts["mid"]


def family(depth: int, patches: int, delta: float, drop: int | None = None, rule: Rule | None = None) -> Schedule:
    """The one-parameter family around the recalled 3.08 GFLOPs schedule of DeiT-S.

    After 1/12, 3/12, 6/12, 9/12 and 11/12 of the blocks; keep 1, 1-δ, 1-2δ, 1-3δ, 1; ``drop`` tokens per S-stage (default: the
    paper's 10 of 196, in proportion). δ = 0.1 on twelve blocks is the recalled schedule itself.

    Raises:
        UserError: δ outside [0, 1/3).
    """
    if not 0.0 <= delta < 1.0 / 3.0:
        raise UserError(f"delta={delta} must lie in [0, 1/3): the fourth layer keeps 1 - 3·delta")
    places = sorted({max(1, round(depth * share / 12)) for share in (1, 3, 6, 9, 11)})
    shares: Sequence[float] = (1.0, 1.0 - delta, 1.0 - 2.0 * delta, 1.0 - 3.0 * delta, 1.0)
    amount = round(10 * patches / 196) if drop is None else drop
    layers = tuple(
        Layer(after, share, amount, votes(after, depth)) for after, share in zip(places, shares, strict=False)
    )
    return Schedule(layers, rule or Rule())


def stages(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers that remove anything."""
    return tuple(layer for layer in layers if layer.keep < 1.0 or layer.drop)
