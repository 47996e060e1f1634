"""A schedule for any timm name or checkpoint file, and a target of FLOPs or of modelled latency."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from papers.zero_tprune.budget import solve, solve_latency
from papers.zero_tprune.counts import flops as count
from papers.zero_tprune.hardware import Assumed, latency_function
from papers.zero_tprune.imagenet import create
from papers.zero_tprune.plans import Rule, Schedule
from papers.zero_tprune.shape import Shape, shape_of
from shared.errors import UserError
from shared.hardware import Device


@dataclass(frozen=True)
class Found:
    """A schedule, what was asked for and what it gives, both as shares of the unpruned model."""

    what: str  # flops | latency
    shape: Shape
    plan: Schedule
    asked: float
    got: float
    seconds: Callable[[Schedule | None], float]  # modelled latency of a schedule, or of the unpruned model

    def rows(self) -> list[dict[str, Any]]:
        """The schedule, one row per pruning layer."""
        patches = self.plan.patches(self.shape.depth, self.shape.patches)
        return [
            {"after_block": layer.after, "drop": layer.drop, "keep": layer.keep, "votes": layer.iterations,
             "patches_in": patches[layer.after - 1], "patches_out": patches[layer.after]} for layer in self.plan.layers
        ]  # fmt: skip

    def describe(self) -> str:
        """The schedule on one line."""
        from papers.zero_tprune.search import describe

        return describe(self.plan)


def find(
    model: str, *, weights: str | None = None, flops: float | None = None, latency: float | None = None, device: Device, dtype: str,
    batch: int, assumed: Assumed, rule: Rule | None = None,
) -> Found:  # fmt: skip
    """The schedule that meets ``latency`` (a share of the unpruned model's on ``device``), or else ``flops`` (a share, or FLOPs above 1).

    Raises:
        UserError: no such model or weights, a backbone that cannot be pruned, a target out of reach, or none at all.
    """
    from shared.workload import meta_model

    built = meta_model(create, model) if weights is None else create(model, weights)
    shape = shape_of(built, model)
    seconds = latency_function(shape, device, batch, dtype, assumed, "streamed")
    if latency is not None:
        plan = solve_latency(shape, latency, seconds, rule=rule)
        return Found("latency", shape, plan, latency, seconds(plan) / seconds(None), seconds)
    if flops is None:
        raise UserError("give flops=SHARE or latency=SHARE of the unpruned model")
    plan, base = solve(shape, flops, rule=rule), count(shape).total("blocks")
    asked = flops if flops <= 1 else flops / base
    return Found("flops", shape, plan, asked, count(shape, plan).total("blocks") / base, seconds)
