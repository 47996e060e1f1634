"""A forward pass of DeiT-T on a CPU: unpruned against pruned, as a ratio inside one run."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from papers.zero_tprune import Schedule, family, prune
from papers.zero_tprune.importance import attention, start_vector, wpr
from shared.measure import measure


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["zero_tprune", "truncate"])
def test_forward(benchmark: Any, method: str) -> None:
    model, images = timm.create_model("deit_tiny_patch16_224").eval(), torch.randn(2, 3, 224, 224)
    plan = family(12, 196, 0.1).with_rule(method=method)
    with prune(model, plan) as pruner:

        def run(chosen: Schedule) -> None:
            pruner.plan = chosen
            model(images)

        benchmark.pedantic(run, args=(plan,), rounds=5, warmup_rounds=1)
        if not benchmark.disabled:
            timings = measure({"unpruned": lambda: run(Schedule(())), "pruned": lambda: run(plan)}, rounds=9)
            benchmark.extra_info["ratio: pruned / unpruned"] = timings.ratio("pruned", "unpruned").median


def test_votes(benchmark: Any) -> None:
    """Five votes of DeiT-S's heads, the attention map included, against the map alone and against fused attention."""
    q, k = torch.randn(2, 2, 6, 197, 64).unbind(0)
    functions = {
        "votes": lambda: wpr(attention(q, k, 0.125), start_vector(197, 1), 5),
        "map": lambda: attention(q, k, 0.125),
        "fused attention": lambda: F.scaled_dot_product_attention(q, k, q),
    }
    timings = measure(functions, rounds=9)
    for other in ("map", "fused attention"):
        benchmark.extra_info[f"ratio: votes / {other}"] = timings.ratio("votes", other).median
    benchmark(functions["votes"])
