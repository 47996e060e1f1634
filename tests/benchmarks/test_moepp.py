"""Hot paths of MoE++ on a CPU: the execution paths, the mix and the router, at the stand-in's size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from papers.moepp.layer import MoEPlusPlus
from papers.moepp.routing import Experts
from papers.moepp.synthetic import exact_routing
from papers.moepp.zero import dense_mix
from shared.measure import measure

TOKENS, WIDTH, INNER, EXPERTS = 2048, 64, 128, Experts(16, 2, 1, 1)


def routed(tau: float) -> tuple[MoEPlusPlus, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = MoEPlusPlus(WIDTH, INNER, EXPERTS.ffn, tau=tau)
    return layer, torch.randn(TOKENS, WIDTH), exact_routing(TOKENS, 2, EXPERTS, tau), torch.rand(TOKENS, 2)


@pytest.mark.parametrize("path", ["loop", "sorted", "grouped"])
def test_experts(benchmark: Any, path: str) -> None:
    layer, x, ids, gates = routed(0.75)

    def run(chosen: str) -> Any:
        layer.path = chosen  # type: ignore[assignment]
        return layer.compute(x, ids, gates)

    with torch.inference_mode():
        if path != "loop":
            timings = measure({path: lambda: run(path), "loop": lambda: run("loop")}, rounds=9)
            benchmark.extra_info[f"ratio: {path} / loop"] = timings.ratio(path, "loop").median
        benchmark(run, path)


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_fewer_ffn_experts(benchmark: Any, tau: float) -> None:
    layer, x, ids, gates = routed(tau)
    with torch.inference_mode():
        benchmark(layer.compute, x, ids, gates)


def test_mix(benchmark: Any) -> None:
    layer, x, ids, gates = routed(0.1)
    assert layer.constants is not None
    with torch.inference_mode():
        benchmark(dense_mix, x, ids, gates, EXPERTS, layer.constants.weight, layer.constants.vector)


def test_layer_forward_and_backward(benchmark: Any) -> None:
    layer, x, _, _ = routed(0.75)

    def step() -> None:
        layer(x).y.sum().backward()

    benchmark(step)
