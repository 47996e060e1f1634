"""The MoE layer: gates, routers, the three execution orders, the balance loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from papers.m3vit import dispatch
from papers.m3vit.moe import (
    ORDERS,
    Experts,
    MoE,
    Router,
    TaskConditionedRouter,
    TaskEmbedding,
    balance_loss,
    cv_squared,
    route,
)
from shared.errors import UserError

ORDER_PAIRS = list(itertools.combinations(ORDERS, 2))


def make_moe(dim: int = 8, num_experts: int = 16, top_k: int = 4, routers: int = 1, order: str = "grouped") -> MoE:
    torch.manual_seed(0)
    moe = MoE(Experts(dim, dim, num_experts), Router(dim, num_experts, routers), top_k, order=order).double()
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.5)
    return moe


def make_identical(experts: Experts) -> None:
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))


def expert(experts: Experts, e: int, x: torch.Tensor) -> torch.Tensor:
    hidden = F.gelu(F.linear(x, experts.weight1[e], experts.bias1[e]))
    return F.linear(hidden, experts.weight2[e], experts.bias2[e])


# --- gates -----------------------------------------------------------------------------------------------------------


def test_gates_are_the_top_probabilities_of_a_softmax_over_all_experts() -> None:
    # softmax(ln 1, ln 2, ln 3, ln 4) = 0.1, 0.2, 0.3, 0.4; a renormalising router would give 4/7 and 3/7
    routing = route(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]).log(), top_k=2)
    assert routing.experts.tolist() == [[[3, 2]]]
    torch.testing.assert_close(routing.gates, torch.tensor([[[0.4, 0.3]]]))


@pytest.mark.parametrize("order", ORDERS)
def test_one_expert_is_the_dense_mlp_bit_for_bit(order: str) -> None:
    moe = make_moe(num_experts=1, top_k=1, order=order).float()
    x = torch.randn(1, 21, 8)
    y, routing = moe(x, [0])
    assert torch.equal(routing.gates, torch.ones_like(routing.gates))
    if order == "token_by_token":  # multiplies one row at a time, which rounds differently in the matrix product itself
        torch.testing.assert_close(y[0], expert(moe.experts, 0, x[0]), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(y[0], expert(moe.experts, 0, x[0]))


@pytest.mark.parametrize("order", ORDERS)
def test_identical_experts_scale_the_mlp_by_the_gate_sum(order: str) -> None:
    moe = make_moe(order=order)
    make_identical(moe.experts)
    x = torch.randn(1, 33, 8, dtype=torch.float64)
    y, _ = moe(x, [0])
    logits = x[0] @ moe.router.weight[0]
    gate_sum = logits.softmax(-1).sort(-1, descending=True).values[:, :4].sum(-1, keepdim=True)
    assert gate_sum.max() < 0.999  # otherwise renormalisation would pass
    torch.testing.assert_close(y[0], gate_sum * expert(moe.experts, 0, x[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_zero_router_gives_a_quarter_of_identical_experts(order: str) -> None:
    moe = make_moe(order=order)
    make_identical(moe.experts)
    torch.nn.init.zeros_(moe.router.weight)
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    y, routing = moe(x, [0])
    assert torch.equal(routing.gates, torch.full_like(routing.gates, 1 / 16))
    torch.testing.assert_close(y[0], 0.25 * expert(moe.experts, 0, x[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_a_dense_mlp_split_into_four_experts(order: str) -> None:
    torch.manual_seed(1)
    fc1, fc2 = torch.nn.Linear(8, 32).double(), torch.nn.Linear(32, 8).double()
    moe = make_moe(num_experts=4, top_k=4, order=order)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.experts.weight1.copy_(fc1.weight.view(4, 8, 8))
        moe.experts.bias1.copy_(fc1.bias.view(4, 8))
        moe.experts.weight2.copy_(4 * fc2.weight.view(8, 4, 8).transpose(0, 1))
        moe.experts.bias2.copy_(fc2.bias.expand(4, 8))
    x = torch.randn(1, 25, 8, dtype=torch.float64)
    torch.testing.assert_close(moe(x, [0])[0][0], fc2(F.gelu(fc1(x[0]))), rtol=1e-12, atol=1e-12)


# --- routers ---------------------------------------------------------------------------------------------------------


def test_multi_gate_with_equal_routers_is_the_single_router() -> None:
    single, multi = make_moe(routers=1), make_moe(routers=3)
    with torch.no_grad():
        multi.router.weight.copy_(single.router.weight.expand_as(multi.router.weight))
    multi.experts.load_state_dict(single.experts.state_dict())
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    for task in range(3):
        assert torch.equal(multi(x, [task])[0], single(x, [0])[0])


def test_routers_belong_to_tasks() -> None:
    moe = make_moe(routers=3)
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    together, _ = moe(x.expand(3, -1, -1), [0, 1, 2])
    for task in range(3):
        torch.testing.assert_close(together[task], moe(x, [task])[0][0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[0], together[1])


def test_task_conditioned_router_multiplies_the_concatenation() -> None:
    torch.manual_seed(0)
    router = TaskConditionedRouter(8, 16, TaskEmbedding(5)).double()
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    task_vectors = router.embedding([1, 4])
    assert (task_vectors >= 0).all()  # t_i = ReLU(MLP(e_i))
    assert task_vectors.shape == (2, 64)
    both = torch.cat([x, task_vectors[:, None].expand(2, 12, 64)], -1)
    expected = both @ torch.cat([router.weight, router.task_weight])
    torch.testing.assert_close(router(x, [1, 4]), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(router(x[1:], [4])[0], expected[1], rtol=1e-12, atol=1e-12)


def test_task_conditioned_router_with_zero_task_weights_is_the_single_router() -> None:
    single = make_moe()
    router = TaskConditionedRouter(8, 16, TaskEmbedding(5)).double()
    with torch.no_grad():
        router.weight.copy_(single.router.weight[0])
        router.task_weight.zero_()
    conditioned = MoE(single.experts, router, 4)
    x = torch.randn(1, 40, 8, dtype=torch.float64)
    for task in range(5):
        assert torch.equal(conditioned(x, [task])[0], single(x, [0])[0])


# --- execution orders ------------------------------------------------------------------------------------------------


@st.composite
def routings(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    """Number of experts and any (S, K) choice of distinct experts per token, skewed so that experts stay empty."""
    num_experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, num_experts))
    used = draw(st.integers(top_k, num_experts))
    tokens = draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    choice = torch.rand(tokens, used, generator=generator).argsort(-1)[:, :top_k]
    return num_experts, choice + (num_experts - used)


@settings(max_examples=60, deadline=None)
@given(routings(), st.sampled_from(ORDER_PAIRS))
def test_orders_agree_for_any_routing(routing: tuple[int, torch.Tensor], pair: tuple[str, str]) -> None:
    num_experts, index = routing
    torch.manual_seed(2)
    experts = Experts(6, 5, num_experts).double()
    x = torch.randn(len(index), 6, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(len(index), 6, dtype=torch.float64)
    results = []
    for order in pair:
        y = ORDERS[order](experts, x, gates, index)
        leaves = [x, gates, *experts.parameters()]
        results.append([y.detach(), *torch.autograd.grad(y, leaves, seed, materialize_grads=True)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_orders_against_a_masked_sum_over_all_experts(order: str) -> None:
    moe = make_moe(order=order)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    x[:, :7] = 0.0  # all logits tie at zero
    y, routing = moe(x, [0, 0])
    everything = torch.stack([expert(moe.experts, e, x) for e in range(16)], -2)
    weight = torch.zeros(2, 30, 16, dtype=torch.float64).scatter(-1, routing.experts, routing.gates)
    torch.testing.assert_close(y, (weight[..., None] * everything).sum(-2), rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(routings(), st.sampled_from([dispatch.blocked_rows, dispatch.looped_rows]))
def test_layouts_agree_for_any_routing(
    routing: tuple[int, torch.Tensor], layout: Callable[[torch.Tensor, int], dispatch.Rows]
) -> None:
    num_experts, index = routing
    check_layout(layout, num_experts, index, torch.float64, 1e-12)


def test_blocks_hold_long_and_empty_queues() -> None:
    index = torch.stack([torch.zeros(900, dtype=torch.int64), 2 + torch.arange(900) % 3], 1)
    check_layout(dispatch.blocked_rows, 7, index, torch.float64, 1e-12)


def test_grouped_product_agrees_in_single_precision() -> None:
    index = torch.rand(50, 16).argsort(-1)[:, :4] // 2 * 2  # odd experts stay empty
    check_layout(dispatch.grouped_rows, 16, index, torch.float32, 1e-5)


def check_layout(
    layout: Callable[[torch.Tensor, int], dispatch.Rows],
    num_experts: int,
    index: torch.Tensor,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    """Output and all gradients against the reference order."""
    torch.manual_seed(2)
    experts = Experts(8, 8, num_experts).to(dtype)
    x = torch.randn(len(index), 8, dtype=dtype, requires_grad=True)
    gates = torch.rand(index.shape, dtype=dtype, requires_grad=True)
    seed = torch.randn(len(index), 8, dtype=dtype)
    results = []
    for choose in (None, layout):
        with pytest.MonkeyPatch.context() as patch:
            if choose is not None:
                patch.setattr(dispatch, "layout_for", lambda _: choose)  # noqa: B023
            y = (experts.token_by_token if choose is None else experts.grouped)(x, gates, index)
            leaves = [x, gates, *experts.parameters()]
            results.append([y.detach(), *torch.autograd.grad(y, leaves, seed, materialize_grads=True)])
            with torch.no_grad():
                torch.testing.assert_close(experts.grouped(x, gates, index), y.detach(), rtol=tolerance, atol=tolerance)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_unknown_order_names_the_choices() -> None:
    moe = make_moe()
    moe.order = "expert_by_token"
    with pytest.raises(UserError, match="expert_by_expert"):
        moe(torch.randn(1, 3, 8, dtype=torch.float64), [0])


def test_permuting_experts_leaves_the_output_unchanged() -> None:
    moe, permuted = make_moe(), make_moe()
    order = torch.randperm(16)
    with torch.no_grad():
        for parameter in permuted.experts.parameters():
            parameter.copy_(parameter[order].clone())
        permuted.router.weight.copy_(permuted.router.weight[..., order].clone())
    x = torch.randn(1, 50, 8, dtype=torch.float64)
    torch.testing.assert_close(permuted(x, [0])[0], moe(x, [0])[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [1025, 3])
def test_meta_tensors_cost_exactly_the_routed_products(tokens: int) -> None:
    with torch.device("meta"):
        moe = MoE(Experts(384, 384, 16), Router(384, 16), 4)
        x = torch.empty(1, tokens, 384)
    with FlopCounterMode(display=False) as counter:
        y, _ = moe(x, [0])
    assert y.shape == x.shape
    router_flops = 2 * tokens * 384 * 16
    assert counter.get_total_flops() == 4 * tokens * 2 * 2 * 384 * 384 + router_flops


def test_meta_tensors_read_every_expert() -> None:
    reads: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.baddbmm.default:
                reads.append(tuple(args[2].shape))
            return func(*args, **(kwargs or {}))

    with torch.device("meta"):
        experts = Experts(8, 8, 16)
        x, gates = torch.empty(1025, 8), torch.empty(1025, 4)
        index = torch.empty(1025, 4, dtype=torch.int64)
    with torch.no_grad(), Watch():
        experts.grouped(x, gates, index)
    assert sum(shape[0] for shape in reads) == 2 * 16  # two layers of every expert, each once


# --- initialisation, noise, balance ----------------------------------------------------------------------------------


def test_experts_start_uniform_within_one_over_root_fan_in() -> None:
    torch.manual_seed(0)
    experts = Experts(64, 16, 16)
    for parameter, fan_in in [(experts.weight1, 64), (experts.bias1, 64), (experts.weight2, 16), (experts.bias2, 16)]:
        bound = fan_in**-0.5
        assert 0.9 * bound < parameter.abs().max() <= bound
        assert abs(parameter.std() - bound / 3**0.5) < 0.1 * bound


def test_balance_loss_by_hand() -> None:
    # unbiased CV² of (n, …, n, 0, …, 0) with K of N equal entries is N/(N−1)·(N/K−1) = 16/15·3 = 3.2
    logits = torch.full((1, 10, 16), -50.0)
    logits[..., [2, 5, 7, 11]] = 0.0
    routing = route(logits, top_k=4)
    torch.testing.assert_close(balance_loss(routing), torch.tensor(6.4))
    torch.testing.assert_close(cv_squared(torch.tensor([1.0, 3.0])), torch.tensor(0.5))  # var 2, mean 2


def test_balance_loss_of_uniform_use_is_zero_and_sums_over_routers() -> None:
    shifts = torch.stack([torch.roll(torch.arange(16), int(s)) for s in range(16)]).float()
    even = route(shifts[None], top_k=4)
    torch.testing.assert_close(balance_loss(even), torch.tensor(0.0), atol=1e-6, rtol=0.0)
    lopsided = torch.full((1, 16, 16), -50.0)
    lopsided[..., :4] = 0.0
    pair = route(torch.cat([shifts[None], lopsided]), top_k=4)
    torch.testing.assert_close(balance_loss(pair), torch.tensor(6.4))


def test_only_importance_has_a_gradient_without_noise() -> None:
    logits = torch.randn(1, 64, 16, requires_grad=True)
    routing = route(logits, top_k=4)
    importance = torch.zeros(1, 16).scatter_add(1, routing.experts.flatten(1), routing.gates.flatten(1))
    expected = torch.autograd.grad(cv_squared(importance).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(balance_loss(routing), logits)[0], expected)


def test_noisy_load_is_the_probability_of_staying_in_the_top() -> None:
    # One token, K=1, N=2: the rival's noisy logit is the threshold for the other, as drawn.
    torch.manual_seed(3)
    logits = torch.tensor([[[0.3, 0.0]]], dtype=torch.float64)
    routing = route(logits, top_k=1, noise_std=0.5)
    torch.manual_seed(3)
    noisy = logits + 0.5 * torch.randn_like(logits)
    normal = torch.distributions.Normal(0.0, 1.0)
    expected = torch.stack(
        [normal.cdf((logits[0, 0, 0] - noisy[0, 0, 1]) / 0.5), normal.cdf((logits[0, 0, 1] - noisy[0, 0, 0]) / 0.5)]
    )
    assert routing.load is not None
    torch.testing.assert_close(routing.load[0], expected)
    torch.testing.assert_close(routing.gates[0, 0, 0], noisy.softmax(-1).max())


def test_noise_acts_in_training_only_and_shrinks_with_the_number_of_experts() -> None:
    moe = make_moe()
    moe.noise = 1.0
    x = torch.randn(1, 4000, 8, dtype=torch.float64)
    quiet = moe.eval()(x, [0])[1]
    torch.nn.init.zeros_(moe.router.weight)
    noisy = moe.train()(x, [0])[1]
    assert torch.equal(quiet.probs, make_moe().eval()(x, [0])[1].probs)
    spread = noisy.probs.log().var(-1).mean().sqrt()  # log-softmax keeps the spread of the logits: σ/N = 1/16
    assert abs(spread - 1 / 16) < 0.002
