"""Find the schedule of the family that meets a budget: FLOPs, or latency on a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from papers.zero_tprune import counts
from papers.zero_tprune.counts import Convention
from papers.zero_tprune.plans import Rule, Schedule, ToMe, family
from papers.zero_tprune.shape import Shape, shape_of
from shared.errors import UserError

if TYPE_CHECKING:
    from torch import nn

STEPS = 333  # δ in thousandths: counts are integers, a finer step changes nothing


def solve(
    model: Shape | nn.Module,
    flops: float,
    *,
    rule: Rule | None = None,
    convention: Convention = "blocks",
    drop: int | None = None,
) -> Schedule:
    """The schedule whose FLOPs, pruning included, come closest to the target.

    Args:
        model: a timm ViT, or its shape.
        flops: a share of the unpruned model below 1, or a number of FLOPs (1 MAC = 1 FLOP) above.
        drop: tokens per S-stage; without it the paper's share, and fewer where that alone would cut too much.

    Raises:
        UserError: a target that the family cannot reach; says what it can.
    """
    if not flops > 0:
        raise UserError(f"flops={flops:g} must be positive: a share of the unpruned model, or FLOPs")
    shape = _shape(model)
    base = counts.flops(shape).total(convention)
    target = flops * base if flops <= 1.0 else flops
    if target > base:
        raise UserError(f"flops={flops:g} is more than the unpruned model has ({base / 1e9:.4g} G, {convention})")
    return _nearest(shape, target, lambda plan: counts.flops(shape, plan).total(convention), rule, drop, "flops", base)


def solve_latency(
    model: Shape | nn.Module,
    latency: float,
    seconds: Callable[[Schedule | None], float],
    *,
    rule: Rule | None = None,
    drop: int | None = None,
) -> Schedule:
    """The schedule whose latency comes closest to the target.

    Args:
        latency: a share of the unpruned model's latency.
        seconds: latency of a schedule (:func:`papers.zero_tprune.hardware.latency_function`, or a measurement).

    Raises:
        UserError: pruning does not get there on this device; says what it reaches.
    """
    if not 0 < latency <= 1:
        raise UserError(f"latency={latency:g} must be a share of the unpruned model's latency, above 0 and at most 1")
    shape, base = _shape(model), seconds(None)
    return _nearest(shape, latency * base, seconds, rule, drop, "latency", base)


def solve_tome(shape: Shape, flops: float, *, convention: Convention = "blocks") -> ToMe:
    """ToMe with a near-constant r (r+1 in the first blocks, r in the rest) whose FLOPs come closest to a share of the unpruned ones."""
    target = flops * counts.flops(shape).total(convention)
    plans = [
        ToMe(tuple(r + (block < extra) for block in range(shape.depth)))
        for r in range(shape.patches // 2)
        for extra in range(shape.depth)
    ]
    return min(plans, key=lambda plan: abs(counts.flops(shape, plan).total(convention) - target))


def _shape(model: Shape | nn.Module) -> Shape:
    return model if isinstance(model, Shape) else shape_of(model)


def _nearest(
    shape: Shape,
    target: float,
    cost: Callable[[Schedule], float],
    rule: Rule | None,
    drop: int | None,
    what: str,
    base: float,
) -> Schedule:
    def at(step: int, amount: int | None) -> Schedule:
        return family(shape.depth, shape.patches, step / 1000.0, amount, rule)

    amounts = [drop] if drop is not None else list(range(round(10 * shape.patches / 196), -1, -1))
    for amount in amounts:  # fewer dropped in the S-stage until the mildest member lies above the target
        if cost(at(0, amount)) >= target:
            break
    else:
        if drop is not None:
            raise UserError(
                f"{what}={target / base:.3g}: drop={drop} alone already cuts to {cost(at(0, drop)) / base:.3g}; use a smaller drop"
            )
    if cost(at(STEPS, amount)) > target:
        raise UserError(
            f"{what}={target / base:.3g} of the unpruned model cannot be reached: the strongest schedule of this family gives "
            f"{cost(at(STEPS, amount)) / base:.3g}; raise the target or give a schedule of your own"
        )
    low, high = 0, STEPS  # cost falls with δ
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(at(middle, amount)) >= target else (low, middle)
    return min((at(low, amount), at(high, amount)), key=lambda plan: abs(cost(plan) - target))
