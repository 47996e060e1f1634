"""The CPU path without gradients against the loop and torch's own functions."""

from __future__ import annotations

import threading

import pytest
import torch

from papers.moepp import cpu
from papers.moepp.layer import MoE, MoEPlusPlus
from papers.moepp.routing import Experts, select
from papers.moepp.synthetic import exact_routing


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_and_softmax(k: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(50, 9)
    largest, columns = cpu.top(values, k)
    want = values.topk(k)
    assert torch.equal(largest, want.values)
    assert torch.equal(columns, want.indices)
    torch.testing.assert_close(cpu.softmax_of_few(largest), torch.softmax(largest, -1))


def test_ties_give_different_experts() -> None:
    """All probabilities equal: the first K columns, none of them twice."""
    _, columns = cpu.top(torch.zeros(3, 4), 3)
    assert columns.tolist() == [[0, 1, 2]] * 3


def test_softmax_of_few_does_not_overflow() -> None:
    assert cpu.softmax_of_few(torch.tensor([[1000.0, 999.0]])).tolist() == [
        [pytest.approx(0.7310586), pytest.approx(0.2689414)]
    ]


@pytest.mark.parametrize("gating", ["paper", "repo", "mixtral"])
def test_routing_is_that_with_gradients(gating: str) -> None:
    torch.manual_seed(0)
    logits, experts = torch.randn(40, 7), Experts(4, 1, 1, 1)
    want = select(logits, 2, experts, gating)  # type: ignore[arg-type]
    with torch.no_grad():
        got = select(logits, 2, experts, gating)  # type: ignore[arg-type]
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.gates, want.gates)


def test_group_sorts_by_expert_and_leaves_the_others_last() -> None:
    ids = torch.tensor([[2, 0], [3, 2], [0, 5], [4, 2]])  # of 3 FFN experts: 3, 4 and 5 are none
    order, place, sizes = cpu.group(ids, 3)
    assert sizes == [2, 0, 3]
    assert order[:5].tolist() == [1, 4, 0, 3, 7]
    assert torch.equal(order[place.reshape(-1)], torch.arange(8))


@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_loop(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = MoEPlusPlus(16, 24, 8, path="loop").to(dtype)
    x, gates = torch.randn(tokens, 16, dtype=dtype), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(layer.experts.total)[:2] for _ in range(tokens)])
    with torch.no_grad():
        want = layer.compute(x, ids, gates)
        layer.path = "sorted"
        for _ in range(2):  # the second time in memory that holds the first result
            got = layer.compute(x, ids, gates)
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_results_outlive_the_scratch_memory() -> None:
    torch.manual_seed(0)
    layer, x = MoE(16, 24, 4), torch.randn(30, 16)
    with torch.no_grad():
        first = layer(x).y
        kept = first.clone()
        layer(-x)
    assert torch.equal(first, kept)


def test_inference_mode_leaves_usable_memory() -> None:
    """Memory first made inside inference mode is written outside of it, in a thread that has none yet."""
    layer, x, failed = MoE(16, 24, 4), torch.randn(30, 16), []

    def run() -> None:
        try:
            with torch.inference_mode():
                want = layer(x).y
            with torch.no_grad():
                torch.testing.assert_close(layer(x).y, want)
        except Exception as problem:
            failed.append(problem)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed


def test_no_token_at_an_ffn_expert() -> None:
    layer = MoEPlusPlus(8, 8, 2)
    ids = torch.tensor([[4, 5], [5, 4]])  # copy and zero
    with torch.no_grad():
        y = layer.compute(torch.ones(2, 8), ids, torch.tensor([[0.25, 0.5], [0.25, 0.5]]))
    torch.testing.assert_close(y, torch.tensor([0.25, 0.5])[:, None].expand(2, 8))


def test_large_layers_keep_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "KEPT_BYTES", 0)
    torch.manual_seed(0)
    layer = MoEPlusPlus(16, 24, 4)
    x, ids, gates = torch.randn(20, 16), exact_routing(20, 2, layer.experts, 0.75), torch.rand(20, 2)
    monkeypatch.setattr(cpu, "_workspace", cpu._Workspace())
    with torch.no_grad():
        got = layer.compute(x, ids, gates)
        layer.path = "loop"
        torch.testing.assert_close(got, layer.compute(x, ids, gates))
    assert cpu._workspace.kept is None
