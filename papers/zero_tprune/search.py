"""Monte-Carlo search of schedules at a FLOPs budget (Sec. 3): draw, score on training images, keep the best. Nothing is trained.

ToMe gets the same number of draws over its per-block counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from papers.zero_tprune import counts
from papers.zero_tprune.counts import Convention
from papers.zero_tprune.plans import ATS, Layer, Plan, Rule, Schedule, ToMe, votes
from papers.zero_tprune.pruner import Pruner, prune
from papers.zero_tprune.shape import Shape, shape_of

TOLERANCE = 0.01  # of the target: a draw outside is thrown away
P = TypeVar("P", Schedule, ToMe)


def draw_schedule(shape: Shape, share: float, generator: torch.Generator, rule: Rule | None = None) -> Schedule | None:
    """Three to five places, random keep rates and S-stage drops, scaled to ``share`` of the blocks' FLOPs; None where no scale fits."""

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    depth, unit = shape.depth, max(1, round(shape.patches / 32))
    number = min(integer(3, 6), depth - 1)
    places = sorted((torch.randperm(depth - 1, generator=generator)[:number] + 1).tolist())
    weights = torch.rand(number, generator=generator).tolist()
    drops = [unit * integer(0, 5) for _ in places]

    def at(scale: float) -> Schedule:
        layers = (
            Layer(after, max(0.05, 1.0 - scale * weight), drop, votes(after, depth))
            for after, weight, drop in zip(places, weights, drops, strict=True)
        )
        return Schedule(tuple(layers), rule or Rule())

    return _scaled(at, shape, share, 1.0)


def draw_tome(shape: Shape, share: float, generator: torch.Generator) -> ToMe | None:
    """Random merge counts per block, scaled to ``share`` of the blocks' FLOPs; None where no scale fits."""
    weights = torch.rand(shape.depth, generator=generator).tolist()
    return _scaled(
        lambda scale: ToMe(tuple(round(scale * weight * shape.patches) for weight in weights)), shape, share, 1.0
    )


def _scaled(at: Callable[[float], P], shape: Shape, share: float, highest: float) -> P | None:
    target = share * counts.flops(shape).total("blocks")
    low, high = 0.0, highest
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if counts.flops(shape, at(middle)).total("blocks") > target else (low, middle)
    best = min((at(low), at(high)), key=lambda plan: abs(counts.flops(shape, plan).total("blocks") - target))
    return best if abs(counts.flops(shape, best).total("blocks") / target - 1) <= TOLERANCE else None


def draws(draw: Callable[[torch.Generator], P | None], number: int, generator: torch.Generator) -> list[P]:
    """``number`` valid draws (fewer only after fifty times as many attempts)."""
    found: list[P] = []
    for _ in range(50 * number):
        plan = draw(generator)
        if plan is not None:
            found.append(plan)
        if len(found) == number:
            break
    return found


def correct(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 250) -> Tensor:
    """Which images the model gets right [n], under whatever plan it has."""
    hits = []
    with torch.inference_mode():
        for part, truth in zip(images.split(batch), labels.split(batch), strict=True):
            hits.append(model(part).argmax(dim=-1) == truth)
    return torch.cat(hits)


def best_plan(pruner: Pruner, plans: Sequence[P], images: Tensor, labels: Tensor) -> P:
    """The plan with the most images right; the first of equals."""
    scores = []
    for plan in plans:
        pruner.plan = plan
        scores.append(int(correct(pruner.model, images, labels).sum()))
    return plans[scores.index(max(scores))]


def search(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    flops: float,
    *,
    number: int = 50,
    seed: int = 0,
    rule: Rule | None = None,
) -> Schedule:
    """The best of ``number`` random schedules at a share ``flops`` of the unpruned blocks' FLOPs.

    ``images`` and ``labels`` come from the *training* split: never choose on the images that you report.
    """
    shape, generator = shape_of(model), torch.Generator().manual_seed(seed)
    plans = draws(lambda g: draw_schedule(shape, flops, g, rule), number, generator)
    if not plans:
        from shared.errors import UserError

        raise UserError(f"no random schedule met flops={flops:g} within {TOLERANCE:.0%}: ask for a milder cut")
    with prune(model, Schedule(())) as pruner:
        return best_plan(pruner, plans, images, labels)


def ats_for_share(
    pruner: Pruner, shape: Shape, images: Tensor, share: float, convention: Convention = "blocks"
) -> tuple[ATS, float]:
    """ATS whose mean FLOPs over ``images`` come closest to a share, and the share that it gets."""
    base, first = counts.flops(shape).total(convention), max(1, round(shape.depth / 3))

    def used(samples: int) -> float:
        pruner.plan = ATS(samples, first)
        with torch.inference_mode():
            pruner.model(images)
        per_block = [float(count.float().mean()) for count in pruner.kept_tokens()]
        return counts.flops_of_counts(shape, [round(c) for c in per_block], inside=True).total(convention) / base

    low, high = 1, 4 * shape.patches  # more samples than patches: duplicates still leave
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if used(middle) < share else (low, middle)
    best = min((low, high), key=lambda samples: abs(used(samples) - share))
    return ATS(best, first), used(best)


def describe(plan: Plan) -> str:
    """A plan on one line."""
    if isinstance(plan, Schedule):
        return (
            "; ".join(f"after {y.after}: drop {y.drop}, keep {y.keep:.3g}, {y.iterations} votes" for y in plan.layers)
            or "unpruned"
        )
    return str(plan)
