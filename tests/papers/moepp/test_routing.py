"""Router, gates, balance loss, capacity and synthetic routing, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from papers.moepp.routing import (
    Experts,
    Router,
    Routing,
    balance_loss,
    capacities,
    published_constants,
    select,
    within_capacity,
)
from papers.moepp.synthetic import exact_routing, expert_counts
from shared.errors import UserError

SMALL = Experts(8, 2, 1, 1)  # 0.6B/(8+4)E
MIDDLE = Experts(16, 2, 1, 1)  # 1B and 7B
LOGITS = torch.log(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))


def test_gates_are_a_softmax_over_all_experts() -> None:
    routing = select(LOGITS, 2, Experts(2, 0, 0, 2))
    assert routing.ids.tolist() == [[0, 1]]
    assert routing.gates[0].tolist() == pytest.approx([0.4, 0.3])


def test_mixtral_gates_are_renormalised() -> None:
    assert select(LOGITS, 2, Experts(4), "mixtral").gates[0].tolist() == pytest.approx([4 / 7, 3 / 7])


def test_repo_gates_drop_the_zero_expert() -> None:
    """Ids in the order of the released code: FFN, constant, copy, zero; here the second pick is the zero expert."""
    logits = torch.log(torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
    routing = select(logits, 2, Experts(2, 0, 1, 1), "repo")
    assert routing.ids.tolist() == [[0, 3]]
    assert routing.gates[0].tolist() == pytest.approx([1.0, 0.0])


def test_repo_gates_refuse_two_zero_experts() -> None:
    with pytest.raises(UserError, match="0 by 0"):
        select(LOGITS, 2, Experts(2, 0, 0, 2), "repo")
    with pytest.raises(UserError, match="gating"):
        select(LOGITS, 2, Experts(4), "switch")  # type: ignore[arg-type]


def test_balance_loss_by_hand() -> None:
    """p = .4 .3 .2 .1, picks 0 (FFN) and 1 (zero-computation), tau .75: .4 + .75 · .3."""
    experts = Experts(1, 1, 1, 1)
    loss = balance_loss(LOGITS, torch.tensor([[0, 1]]), torch.tensor(experts.eta(0.75)))
    assert float(loss) == pytest.approx(0.625)


@pytest.mark.parametrize(
    ("experts", "tau", "value"),
    [(SMALL, 0.75, 0.15), (MIDDLE, 0.75, 0.09375), (Experts(8), 1.0, 0.25), (Experts(16), 1.0, 0.125)],
)
def test_balance_loss_at_its_fixed_point(experts: Experts, tau: float, value: float) -> None:
    """K·tau/(tau·E + Z), with picks and probabilities proportional to 1/eta."""
    tokens = 4800
    ids = exact_routing(tokens, 2, experts, tau)
    shares = torch.tensor([1 / eta for eta in experts.eta(tau)])
    logits = torch.log(shares / shares.sum()).expand(tokens, -1)
    assert float(balance_loss(logits, ids, torch.tensor(experts.eta(tau)))) == pytest.approx(value, rel=1e-3)


def test_balance_loss_of_uniform_routing() -> None:
    """K·(E + tau·Z)/N²."""
    ids = exact_routing(1200, 2, SMALL, 1.0)
    loss = balance_loss(torch.zeros(1200, 12), ids, torch.tensor(SMALL.eta(0.5)))
    assert float(loss) == pytest.approx(2 * (8 + 0.5 * 4) / 144, rel=1e-5)


def test_ffn_share() -> None:
    assert SMALL.ffn_share(0.75) == pytest.approx(0.6)
    assert MIDDLE.ffn_share(0.1) == pytest.approx(2 / 7)
    assert MIDDLE.ffn_share(1.0) == pytest.approx(16 / 20)
    assert Experts(8).ffn_share(0.3) == 1.0
    assert MIDDLE.ffn_share(1e-9) < 1e-6
    assert MIDDLE.ffn_share(1e9) > 1 - 1e-6


def test_capacity_counts_assignments() -> None:
    assert capacities(2048, 2, SMALL, 0.75, 1.1) == (338, 451)
    assert capacities(2048, 2, Experts(16), 1.0, 1.1) == (math.ceil(1.1 * 4096 / 16),) * 2
    literal = [round(value / 2) for value in capacities(2048, 2, SMALL, 0.75, 1.1)]
    assert 8 * 169 + 4 * 226 == 2256
    assert literal == [169, 226]  # the paper's T taken as tokens: far fewer than the 4096 assignments


def test_number_of_constant_experts() -> None:
    assert [published_constants(n) for n in (8, 16, 32)] == [1, 2, 6]  # Tab. 2 has 2, 2, 6


def test_drop_orders() -> None:
    """Expert 0 takes two: by choice the first choices of tokens 0 and 1; by gate the largest two gates."""
    ids = torch.tensor([[0, 1], [0, 2], [1, 0], [0, 1]])
    gates = torch.tensor([[0.4, 0.3], [0.5, 0.2], [0.6, 0.55], [0.7, 0.1]])
    routing = Routing(torch.zeros(4, 3), gates, ids)
    limits = torch.tensor([2, 9, 9])
    assert within_capacity(routing, limits)[:, 0].tolist() == [True, True, True, False]
    assert within_capacity(routing, limits).tolist()[2] == [True, False]
    by_gate = within_capacity(routing, limits, "gate")
    assert by_gate.tolist() == [[False, True], [False, True], [True, True], [True, True]]


def test_router_carries_logits() -> None:
    torch.manual_seed(0)
    router = Router(6, 5, pathway=True)
    x, before = torch.randn(3, 6), torch.randn(3, 5)
    assert router.pathway is not None
    expected = x @ router.weight.t() + before @ router.pathway.t()
    torch.testing.assert_close(router(x, before), expected)
    with torch.no_grad():
        router.pathway.zero_()
    torch.testing.assert_close(router(x, before), router(x))


def test_router_stays_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    router, x = Router(64, 8, pathway=False), torch.randn(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x @ router.weight.t())


def test_two_layer_router() -> None:
    torch.manual_seed(0)
    router = Router(6, 5, pathway=False, two_layer=True)
    assert router.hidden is not None
    assert router.hidden.shape == (40, 6)
    x = torch.randn(3, 6)
    torch.testing.assert_close(router(x), torch.tanh(x @ router.hidden.t()) @ router.weight.t())


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 400), ffn=st.integers(2, 32), constant=st.integers(0, 6), copy=st.integers(0, 2),
    zero=st.integers(0, 2), tau=st.sampled_from([0.25, 0.5, 0.75, 1.0]), seed=st.integers(0, 3),
)  # fmt: skip
def test_exact_routing(tokens: int, ffn: int, constant: int, copy: int, zero: int, tau: float, seed: int) -> None:
    """Every count is within one of its share, no token picks an expert twice, and the FFN share is rho."""
    experts = Experts(ffn, constant, copy, zero)
    try:
        counts = expert_counts(tokens, 2, experts, tau)
    except UserError:
        return  # one expert would need more than all tokens
    ids = exact_routing(tokens, 2, experts, tau, seed=seed)
    assert torch.bincount(ids.reshape(-1), minlength=experts.total).tolist() == counts
    assert bool((ids[:, 0] != ids[:, 1]).all())
    shares = [1 / eta for eta in experts.eta(tau)]
    assert all(abs(n - 2 * tokens * s / sum(shares)) < 1 for n, s in zip(counts, shares, strict=True))
    assert abs((ids < ffn).sum().item() - 2 * tokens * experts.ffn_share(tau)) < ffn + 1


def test_exact_routing_refuses_the_impossible() -> None:
    with pytest.raises(UserError, match="larger tau"):
        exact_routing(64, 2, Experts(8, 0, 1, 0), 0.1)


def test_a_layer_needs_experts() -> None:
    with pytest.raises(UserError, match="at least one FFN"):
        Experts(0, 1, 1, 1)
