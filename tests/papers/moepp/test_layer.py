"""The layer: worked outputs, agreement of its execution paths, gradients, and what a torch module must do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from papers.moepp import paths
from papers.moepp.layer import MoE, MoEPlusPlus
from papers.moepp.routing import Experts
from papers.moepp.synthetic import exact_routing
from papers.moepp.zero import ConstantExperts, dense_mix
from shared.errors import UserError


def one_by_one(layer: MoEPlusPlus, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    """Eq. 1 token by token, with nothing shared with the library."""
    e = layer.experts
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for gate, expert in zip(gates[t], ids[t].tolist(), strict=True):
            if expert < e.ffn:
                both = layer.w_in[expert] @ x[t]
                half = len(both) // 2
                out = layer.w_out[expert] @ (both[:half] * torch.sigmoid(both[:half]) * both[half:])
            elif expert < e.ffn + e.constant:
                assert layer.constants is not None
                j = expert - e.ffn
                score = layer.constants.weight[j] @ x[t]
                a = torch.exp(score - score.max()) / torch.exp(score - score.max()).sum()
                out = a[0] * x[t] + a[1] * layer.constants.vector[j]
            elif expert < e.ffn + e.constant + e.copy:
                out = x[t]
            else:
                out = torch.zeros_like(x[t])
            y[t] += gate * out
    return y


def make(dtype: torch.dtype = torch.float32, **options: object) -> MoEPlusPlus:
    torch.manual_seed(0)
    layer = MoEPlusPlus(16, 24, 4, **{"n_constant": 3, "n_copy": 2, "n_zero": 2, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        layer.router.weight.mul_(20)
        if layer.constants is not None:
            layer.constants.weight.mul_(20)
            layer.constants.vector.mul_(5)
    return layer.to(dtype)


def test_constant_expert_by_hand() -> None:
    """x = (1, -1), W_c = I, v = (10, 20): a = (.880797, .119203)."""
    experts = ConstantExperts(1, 2)
    x = torch.tensor([[1.0, -1.0]])
    with torch.no_grad():
        experts.weight.copy_(torch.eye(2)[None])
        experts.vector.copy_(torch.tensor([[10.0, 20.0]]))
    assert experts(x, 0)[0].tolist() == pytest.approx([2.072827, 1.503263], abs=1e-5)
    with torch.no_grad():
        experts.weight.zero_()
    assert experts(x, 0)[0].tolist() == pytest.approx([5.5, 9.5])
    with torch.no_grad():
        experts.weight[0, 0].copy_(torch.tensor([100.0, -100.0]))
    torch.testing.assert_close(experts(x, 0), x)  # a large gap of the scores copies the input


def test_gates_of_the_three_rules_by_hand() -> None:
    """Expert 0 is an FFN, expert 1 zero: Eq. 1 damps the FFN by .4, renormalised gates by 4/7, the repo doubles the input instead."""
    torch.manual_seed(0)
    logits = torch.log(torch.tensor([4.0, 3.0]))
    x = torch.randn(1, 4)
    expected = {"paper": (4 / 7, 1.0), "mixtral": (4 / 7, 1.0), "repo": (1.0, 2.0)}  # gate, factor on the input
    for gating, (gate, factor) in expected.items():
        layer = MoEPlusPlus(4, 8, 1, n_constant=0, n_copy=0, n_zero=1, gating=gating)  # type: ignore[arg-type]
        with torch.no_grad():
            layer.router.weight.copy_(logits[:, None] * x / (x @ x.t()))
        want = gate * paths.swiglu(factor * x, layer.w_in[0], layer.w_out[0])
        torch.testing.assert_close(layer(x).y, want)


def test_gates_are_damped_by_experts_that_were_not_picked() -> None:
    """p = .4 .3 .2 .1 over {FFN, zero, zero, zero}: y = .4·E(x); {copy, zero, …}: .4·x."""
    torch.manual_seed(0)
    x = torch.randn(1, 4)
    logits = torch.log(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    layer = MoEPlusPlus(4, 8, 1, n_constant=0, n_copy=0, n_zero=3)
    with torch.no_grad():
        layer.router.weight.copy_(logits[:, None] * x / (x @ x.t()))
    torch.testing.assert_close(layer(x).y, 0.4 * paths.swiglu(x, layer.w_in[0], layer.w_out[0]))
    mixed = MoEPlusPlus(4, 8, 1, n_constant=0, n_copy=1, n_zero=2)
    order = torch.tensor([2, 0, 1, 3])  # logits by id: the FFN gets the third, the copy the first
    with torch.no_grad():
        mixed.router.weight.copy_(logits[order][:, None] * x / (x @ x.t()))
    torch.testing.assert_close(mixed(x).y, 0.4 * x)


def test_dense_mix_is_running_the_experts() -> None:
    layer = make(torch.float64)
    x = torch.randn(50, 16, dtype=torch.float64)
    gates = torch.rand(50, 2, dtype=torch.float64)
    ids = torch.stack([torch.randperm(11)[:2] for _ in range(50)])
    only = torch.where(ids < 4, torch.zeros_like(gates), gates)
    assert layer.constants is not None
    got = dense_mix(x, ids, gates, layer.experts, layer.constants.weight, layer.constants.vector)
    torch.testing.assert_close(got, one_by_one(layer, x, ids, only), atol=1e-12, rtol=1e-12)
    by_module = (
        sum(torch.where(ids == 4 + j, gates, 0.0).sum(1, keepdim=True) * layer.constants(x, j) for j in range(3))
        + torch.where((ids >= 7) & (ids < 9), gates, 0.0).sum(1, keepdim=True) * x
    )
    torch.testing.assert_close(got, by_module, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("path", ["loop", "sorted", "grouped", "capacity"])
@pytest.mark.parametrize(
    "options", [{}, {"n_constant": 0, "n_copy": 0, "n_zero": 0}, {"n_constant": 0}, {"gating": "mixtral"}]
)
def test_paths_agree_with_eq_1(path: str, options: dict[str, object]) -> None:
    factor = {"capacity_factor": 100.0} if path == "capacity" else {}
    layer = make(torch.float64, path=path, **options, **factor)
    x = torch.randn(3, 20, 16, dtype=torch.float64)
    if path == "grouped":  # torch's product knows no float64
        layer, x = layer.float(), x.float()
    out = layer(x)
    gates = torch.softmax(out.logits, -1)
    if options.get("gating") == "mixtral":
        gates = torch.softmax(out.logits.gather(-1, out.ids), -1)
    else:
        gates = gates.gather(-1, out.ids)
    want = one_by_one(layer, x.view(-1, 16), out.ids.view(-1, 2), gates.view(-1, 2)).view_as(x)
    tolerance = 1e-5 if path == "grouped" else 1e-10
    torch.testing.assert_close(out.y, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("path", ["sorted", "grouped", "capacity"])
def test_gradients_agree_with_the_loop(path: str) -> None:
    reference = make(path="loop", capacity_factor=100.0)
    layer = make(path=path, capacity_factor=100.0)
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(40, 16)
    grads = []
    for module in (reference, layer):
        value = x.clone().requires_grad_()
        out = module(value)
        (out.y.square().sum() + out.balance_loss).backward()
        grads.append([value.grad, *(p.grad for p in module.parameters() if p.grad is not None)])
        module.zero_grad()
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("path", ["loop", "sorted", "grouped"])
def test_no_token_reaches_an_ffn(path: str) -> None:
    layer = make(path=path)
    x = torch.randn(10, 16, requires_grad=True)
    ids = torch.tensor([[7, 9]]).expand(10, 2)  # copy and zero
    gates = torch.full((10, 2), 0.25)
    y = layer.compute(x, ids, gates)
    torch.testing.assert_close(y, 0.25 * x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 0.25))  # a copy passes gate · gradient, a zero expert nothing
    assert layer.w_in.grad is None or float(layer.w_in.grad.abs().max()) == 0.0


def test_zero_expert_gets_router_gradient_through_the_normaliser() -> None:
    layer = MoEPlusPlus(8, 8, 1, n_constant=0, n_copy=0, n_zero=1)
    layer(torch.randn(6, 8)).y.square().sum().backward()
    assert layer.router.weight.grad is not None
    assert float(layer.router.weight.grad[1].abs().max()) > 0


def test_an_expert_without_tokens_gets_no_gradient() -> None:
    layer = make(path="grouped", n_constant=0, n_copy=0, n_zero=0)
    ids = torch.tensor([[0, 2]]).expand(8, 2)
    layer.compute(torch.randn(8, 16), ids, torch.rand(8, 2)).sum().backward()
    assert layer.w_in.grad is not None
    assert float(layer.w_in.grad[[1, 3]].abs().max()) == 0.0
    assert float(layer.w_in.grad[[0, 2]].abs().min(-1).values.max()) > 0.0


def test_without_zero_experts_it_is_the_vanilla_layer_bit_for_bit() -> None:
    torch.manual_seed(0)
    vanilla = MoE(16, 24, 8, capacity_factor=1.1)
    torch.manual_seed(0)
    plus = MoEPlusPlus(16, 24, 8, n_constant=0, n_copy=0, n_zero=0, tau=0.3, pathway=False, capacity_factor=1.1)
    x = torch.randn(64, 16)
    a, b = vanilla(x), plus(x)
    assert torch.equal(a.y, b.y)
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.balance_loss, b.balance_loss)
    assert vanilla._limits(64) == (math.ceil(1.1 * 128 / 8),) * 2


def test_capacity_drops_overflow_on_every_path() -> None:
    """Same drops whether the experts are padded or not; dropped assignments show as id N and change the output."""
    x = torch.randn(200, 16)
    free = make(path="sorted")(x)
    results = {}
    for path in ("sorted", "grouped", "capacity"):
        results[path] = make(path=path, capacity_factor=0.8)(x)
        assert int((results[path].ids == 11).sum()) > 0
        torch.testing.assert_close(results[path].y, results["sorted"].y, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(free.y, results["sorted"].y)


def test_dropless_output_does_not_depend_on_the_batch() -> None:
    layer = make(torch.float64)
    x = torch.randn(60, 16, dtype=torch.float64)
    whole = layer(x).y
    torch.testing.assert_close(torch.cat([layer(x[:13]).y, layer(x[13:]).y]), whole)
    shuffle = torch.randperm(60)
    torch.testing.assert_close(layer(x[shuffle]).y, whole[shuffle])
    tight = make(torch.float64, capacity_factor=0.7)
    assert not torch.allclose(torch.cat([tight(x[:13]).y, tight(x[13:]).y]), tight(x).y)


def test_state_dict_autocast_and_compile() -> None:
    layer = make(path="sorted")
    twin = make(path="grouped")
    twin.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = torch.randn(2, 30, 16)
    with torch.no_grad():
        full = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = layer(x)
    assert half.y.dtype == torch.bfloat16
    assert half.logits.dtype == torch.float32
    assert float((half.y.float() - full.y).norm() / full.y.norm()) < 2e-2
    twin = twin.to(torch.bfloat16)  # torch traces its grouped product in bfloat16 only
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x.bfloat16()).y, twin(x.bfloat16()).y, atol=1e-2, rtol=2e-2)


def test_carried_logits_change_the_routing_only_with_pathway() -> None:
    x, before = torch.randn(12, 16), torch.randn(12, 11) * 50
    torch.testing.assert_close(make(pathway=False)(x, before).logits, make(pathway=False)(x).logits)
    assert not torch.allclose(make()(x, before).logits, make()(x).logits)


def test_ffn_per_token() -> None:
    layer = make()
    assert layer.ffn_per_token(torch.tensor([[0, 3], [3, 4], [9, 10]])).tolist() == [2, 1, 0]


def test_bad_options() -> None:
    bad = (
        ({"k": 12}, "k must"),
        ({"tau": 0.0}, "tau"),
        ({"path": "turbo"}, "path"),
        ({"path": "capacity"}, "capacity_factor"),
    )
    for options, words in bad:
        with pytest.raises(UserError, match=words):
            make(**options)


def test_bf16_paths_differ_by_the_order_of_sums_only() -> None:
    """bf16: sums in another order, so agreement to the type's precision."""
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    ids = exact_routing(64, 2, Experts(4, 3, 2, 2), 0.75)
    gates = torch.rand(64, 2)
    layer = make(torch.bfloat16)
    with torch.no_grad():
        layer.path = "loop"
        want = layer.compute(x, ids, gates).float()
        layer.path = "sorted"
        got = layer.compute(x, ids, gates).float()
    assert float((got - want).norm() / want.norm()) < 2e-2
    assert F.cosine_similarity(got.flatten(), want.flatten(), 0) > 0.999
