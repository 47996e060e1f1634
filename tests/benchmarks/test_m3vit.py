"""The three execution orders of the MoE layer on a CPU, against a dense MLP of equal FLOPs and a MoE layer from PyPI.

Ratios are measured in alternation inside one run and recorded in ``extra_info``; absolute times never decide anything.
One image of the paper's small model: T = 1025 tokens, D = h = 384, N = 16 experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from papers.m3vit.model import Mlp
from papers.m3vit.moe import Experts, MoE, Router
from shared.measure import measure

TOKENS, DIM, EXPERTS = 1025, 384, 16


def layer(top_k: int, order: str) -> MoE:
    return MoE(Experts(DIM, DIM, EXPERTS), Router(DIM, EXPERTS, 1), top_k, order=order).eval()


def in_order(moe: MoE, x: torch.Tensor, order: str) -> Any:
    def run() -> torch.Tensor:
        moe.order = order
        return moe(x, None)[0]

    return run


@torch.inference_mode()
def test_execution_orders(benchmark: Any) -> None:
    """Reordering pays on a CPU too: weights of an expert are read once, not once per token."""
    x = torch.randn(1, TOKENS, DIM)
    moe, dense = layer(4, "grouped"), Mlp(DIM, 4 * DIM).eval()
    forms = {order: in_order(moe, x, order) for order in ("token_by_token", "expert_by_expert", "grouped")}
    timings = measure({**forms, "dense": lambda: dense(x)}, rounds=9)
    for name in ("token_by_token", "expert_by_expert"):
        ratio = timings.ratio("grouped", name)
        benchmark.extra_info[f"ratio: grouped / {name}"] = [ratio.low, ratio.median, ratio.high]
    overhead = timings.ratio("grouped", "dense")
    benchmark.extra_info["ratio: grouped / dense MLP of equal FLOPs"] = [overhead.low, overhead.median, overhead.high]
    benchmark.pedantic(forms["grouped"], rounds=5, warmup_rounds=1)
    assert timings.ratio("token_by_token", "grouped").low > 2.0
    assert overhead.median < 2.5


@torch.inference_mode()
def test_against_a_layer_from_pypi(benchmark: Any) -> None:
    """Top-2 of 16, the routing that the peer knows; both with 16 experts of hidden size 384 and GELU."""
    peer_module = pytest.importorskip("mixture_of_experts")
    x = torch.randn(1, TOKENS, DIM)
    ours = layer(2, "grouped")
    peer = peer_module.MoE(
        DIM, num_experts=EXPERTS, hidden_dim=DIM, activation=nn.GELU, second_policy_eval="all", capacity_factor_eval=2.0
    ).eval()
    timings = measure({"ours": in_order(ours, x, "grouped"), "peer": lambda: peer(x)}, rounds=9)
    ratio = timings.ratio("ours", "peer")
    benchmark.extra_info["ratio: ours / mixture-of-experts 0.2.3"] = [ratio.low, ratio.median, ratio.high]
    benchmark.pedantic(in_order(ours, x, "grouped"), rounds=5, warmup_rounds=1)
    assert ratio.high < 1.0
