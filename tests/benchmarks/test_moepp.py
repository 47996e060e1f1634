"""Hot paths of MoE++ on a CPU: the execution paths, the mix and the router, at the stand-in's size."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from papers.moepp.layer import MoE, MoEPlusPlus
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


@pytest.mark.parametrize("tau", [0.1, 0.75])
def test_fewer_ffn_experts(benchmark: Any, tau: float) -> None:
    """Expert time at two tau against the vanilla layer of the same size, on the same path; the least that it can be is rho."""
    layer, x, ids, gates = routed(tau)
    vanilla = MoE(WIDTH, INNER, EXPERTS.ffn)
    every = exact_routing(TOKENS, 2, Experts(EXPERTS.ffn), 1.0)
    run = partial(layer.compute, x, ids, gates)
    with torch.inference_mode():
        timings = measure({"MoE++": run, "MoE": partial(vanilla.compute, x, every, gates)}, rounds=9)
        benchmark.extra_info["ratio: MoE++ / MoE"] = timings.ratio("MoE++", "MoE").median
        benchmark(run)


def test_mix(benchmark: Any) -> None:
    """All zero-computation experts at once, against one by one as in the authors' code."""
    layer, x, ids, gates = routed(0.1)
    constants = layer.constants
    assert constants is not None
    run = partial(dense_mix, x, ids, gates, EXPERTS, constants.weight, constants.vector)

    def one_by_one() -> torch.Tensor:
        y = torch.zeros_like(x)
        for expert in range(EXPERTS.ffn, EXPERTS.total - EXPERTS.zero):
            token, choice = torch.where(ids == expert)
            out = x[token]
            if EXPERTS.kinds[expert] == "constant":
                out = constants(out, expert - EXPERTS.ffn)
            y.index_add_(0, token, gates[token, choice, None] * out)
        return y

    with torch.inference_mode():
        torch.testing.assert_close(run(), one_by_one())
        timings = measure({"mix": run, "one by one": one_by_one}, rounds=9)
        benchmark.extra_info["ratio: mix / one by one"] = timings.ratio("mix", "one by one").median
        benchmark(run)


def test_layer_forward_and_backward(benchmark: Any) -> None:
    """A training step of the layer, router and balance loss included, against the loop over experts."""
    layer, x, _, _ = routed(0.75)

    def step(path: str) -> None:
        layer.path = path  # type: ignore[assignment]
        out = layer(x)
        (out.y.sum() + out.balance_loss).backward()

    timings = measure({path: partial(step, path) for path in ("sorted", "loop")}, rounds=9)
    benchmark.extra_info["ratio: sorted / loop"] = timings.ratio("sorted", "loop").median
    benchmark(step, "sorted")


def test_layer_over_its_products(benchmark: Any) -> None:
    """The vanilla layer, router included, against nothing but its matrix products."""
    torch.manual_seed(0)
    layer, x = MoE(WIDTH, INNER, EXPERTS.ffn), torch.randn(TOKENS, WIDTH)
    rows = torch.randn(EXPERTS.ffn, 2 * TOKENS // EXPERTS.ffn, WIDTH)
    hidden = torch.randn(EXPERTS.ffn, rows.shape[1], INNER)

    def products() -> None:
        for part, inner, w, v in zip(rows, hidden, layer.w_in, layer.w_out, strict=True):
            torch.mm(part, w.t())
            torch.mm(inner, v.t())

    with torch.inference_mode():
        timings = measure({"layer": lambda: layer(x), "products": products}, rounds=9)
        benchmark.extra_info["ratio: layer / products"] = timings.ratio("layer", "products").median
        benchmark(layer, x)
