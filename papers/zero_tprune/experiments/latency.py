"""Latency of the stand-in's plans on this CPU: random weights, since time does not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from papers.zero_tprune.plans import Layer, Plan, Schedule, ToMe
from papers.zero_tprune.pruner import Pruner, prune
from papers.zero_tprune.standin import PLAIN, build
from shared.measure import measure


def latencies(plans: Mapping[str, Any], batch: int) -> dict[tuple[str, str], float]:
    """Median seconds per batch by (method, share), all timed in alternation; ``("base", "")`` is the unpruned model."""
    model = build(0).eval()
    images = torch.randn(batch, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    todo: dict[tuple[str, str], Plan] = {("base", ""): Schedule(())}
    for share, found in plans.items():
        schedule = Schedule(tuple(Layer(*layer) for layer in found["schedule"]), PLAIN)
        todo["full", share] = schedule
        todo["class row", share] = schedule.with_rule(method="cls")
        todo["tome constant", share] = ToMe(tuple(found["tome constant"]))
    with torch.inference_mode(), prune(model, Schedule(())) as pruner:
        calls: dict[str, Callable[[], object]] = {
            "|".join(key): partial(_call, pruner, plan, images) for key, plan in todo.items()
        }
        timings = measure(calls, rounds=9, min_round_s=0.0, warmup=1)
    return {key: timings.by_name["|".join(key)].median_s for key in todo}


def _call(pruner: Pruner, plan: Plan, images: torch.Tensor) -> object:
    if pruner.plan is not plan:
        pruner.plan = plan
    return pruner.model(images)
