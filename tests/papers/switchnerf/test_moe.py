"""Routing: capacity, priority, dispatch against the dense evaluation, balance loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.switchnerf.moe import ExpertMLP, balance_loss, capacity, dispatch


def _probabilities(points: int, experts: int, seed: int = 0) -> torch.Tensor:
    return torch.softmax(2 * torch.randn(points, experts, generator=torch.Generator().manual_seed(seed)), -1)


@pytest.mark.parametrize(
    ("points", "experts", "factor", "expected"), [(10, 4, 1.0, 3), (10, 4, 1.25, 3), (131_072, 8, 1.0, 16_384)]
)
def test_capacity(points: int, experts: int, factor: float, expected: int) -> None:
    assert capacity(points, experts, factor) == expected


def test_priority_keeps_the_most_certain_points() -> None:
    value = torch.tensor([0.9, 0.6, 0.8, 0.7])
    p = torch.stack([value, 1 - value], -1)
    assert dispatch(p, 2, prioritised=True).kept.tolist() == [True, False, True, False]
    assert dispatch(p, 2, prioritised=False).kept.tolist() == [True, True, False, False]


def test_dropped_points_are_zero_and_give_no_gradient() -> None:
    value = torch.tensor([0.9, 0.6, 0.8, 0.7])
    logits = torch.stack([value.log(), (1 - value).log()], -1).requires_grad_()
    x = torch.randn(4, 5, requires_grad=True)
    p = torch.softmax(logits, -1)
    routed = dispatch(p, 2)
    y = routed.combine(ExpertMLP(2, [5, 8, 3])(routed.gather(x), routed))
    assert torch.equal(y[[1, 3]], torch.zeros(2, 3))
    assert (y[[0, 2]] != 0).all()
    y.sum().backward(retain_graph=True)
    assert torch.equal(x.grad[[1, 3]], torch.zeros(2, 5))  # type: ignore[index]
    assert torch.equal(logits.grad[[1, 3]], torch.zeros(2, 2))  # type: ignore[index]
    assert (logits.grad[[0, 2]] != 0).all()  # type: ignore[index]
    logits.grad = None
    balance_loss(p, routed.expert).backward()
    assert (logits.grad != 0).all()  # type: ignore[attr-defined]


@pytest.mark.parametrize("prioritised", [True, False])
@given(points=st.integers(1, 60), experts=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_sorted_dispatch_equals_all_experts_and_a_mask(prioritised: bool, points: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, p = torch.randn(points, 4).double(), _probabilities(points, experts, seed).double()
    value, chosen = p.max(-1)
    plain = ExpertMLP(experts, [4, 6, 3]).double()
    layers: Any = plain.layers
    first, second = layers
    want = torch.zeros(points, 3).double()
    for e in range(experts):
        y = torch.relu(x @ first.weight[e] + first.bias[e]) @ second.weight[e] + second.bias[e]
        want = torch.where((chosen == e)[:, None], y, want)
    want = want * value[:, None]
    for slots in (None, points):  # no limit, and a limit that is never met
        routed = dispatch(p, slots, prioritised)
        got = routed.combine(plain(routed.gather(x), routed))
        torch.testing.assert_close(got, want)
        assert routed.kept.all()


@given(points=st.integers(1, 80), experts=st.integers(1, 5), slots=st.integers(1, 30), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_no_expert_takes_more_than_its_capacity(points: int, experts: int, slots: int, seed: int) -> None:
    p = _probabilities(points, experts, seed)
    routed = dispatch(p, slots)
    for e in range(experts):
        mine = routed.expert == e
        assert int((mine & routed.kept).sum()) == min(slots, int(mine.sum()))
        kept, lost = routed.value[mine & routed.kept], routed.value[mine & ~routed.kept]
        if len(lost):
            assert kept.min() >= lost.max()


def test_balance_loss_closed_forms() -> None:
    uniform = torch.full((12, 4), 0.25)
    assert balance_loss(uniform, torch.zeros(12, dtype=torch.int64)).item() == pytest.approx(1.0)
    one_hot = torch.eye(4)[torch.zeros(12, dtype=torch.int64)]
    assert balance_loss(one_hot, one_hot.argmax(-1)).item() == pytest.approx(4.0)
    even = torch.eye(4).repeat(3, 1)
    assert balance_loss(even, even.argmax(-1)).item() == pytest.approx(1.0)


def test_skip_adds_the_experts_input_before_the_relu() -> None:
    mlp = ExpertMLP(1, [4, 4, 4], skip_after=0)
    layers: Any = mlp.layers
    with torch.no_grad():
        for layer in layers:
            layer.weight.zero_()
            layer.bias.zero_()
        layers[1].weight.copy_(torch.eye(4)[None])
    x = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    routed = dispatch(torch.ones(1, 1), None)
    assert mlp(x, routed).tolist() == [[1.0, 0.0, 3.0, 0.0]]


@pytest.mark.parametrize("slots", [None, 3, 6])
def test_gradients_equal_those_of_all_experts_and_a_mask(slots: int | None) -> None:
    torch.manual_seed(0)
    points, experts = 20, 3
    mlp = ExpertMLP(experts, [4, 5, 2]).double()
    layers: Any = mlp.layers
    first, second = layers
    inputs = [
        torch.randn(points, 4).double().requires_grad_(),
        _probabilities(points, experts).double().requires_grad_(),
    ]
    wanted = [*inputs, *mlp.parameters()]
    upstream = torch.randn(points, 2).double()
    routed = dispatch(inputs[1], slots)
    got = torch.autograd.grad(routed.combine(mlp(routed.gather(inputs[0]), routed)), wanted, upstream)
    x, p = inputs
    value, chosen = p.max(-1)
    dense = torch.zeros(points, 2).double()
    for e in range(experts):
        y = torch.relu(x @ first.weight[e] + first.bias[e]) @ second.weight[e] + second.bias[e]
        dense = dense + y * ((chosen == e) & routed.kept)[:, None]
    for ours, theirs in zip(got, torch.autograd.grad(dense * value[:, None], wanted, upstream), strict=True):
        torch.testing.assert_close(ours, theirs)
    if slots == 3:
        assert not routed.kept.all()


def test_grouped_products_equal_expert_by_expert() -> None:
    torch.manual_seed(0)
    p = _probabilities(40, 5)
    p[:, 2] = 0.0  # an expert without points
    routed = dispatch(p, None)
    mlp, x = ExpertMLP(5, [16, 16, 16, 8], skip_after=0), torch.randn(40, 16)
    assert 0 in routed.offsets.diff().tolist()
    torch.testing.assert_close(mlp.grouped(x, routed), mlp(x, routed))
