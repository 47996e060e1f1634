"""The trace itself: errors that name their place, rules for custom operators, names of modules, no side effects, the table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.errors import UserError
from shared.workload import (
    Call,
    Cost,
    NeedsValues,
    UnknownOperator,
    meta_model,
    register_rule,
    trace,
)
from shared.workload import cost as registry
from shared.workload.rules_memory import VIEWS


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@torch.library.custom_op("workload_test::route", mutates_args=())
def route(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (x @ w).softmax(-1)


@route.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@pytest.fixture
def rules() -> Iterator[None]:
    """Forget the rules that a test registers."""
    before = dict(registry._RULES)
    yield
    registry._RULES.clear()
    registry._RULES.update(before)
    registry.find_rule.cache_clear()


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return route(x, self.weight)


def routed() -> nn.Module:
    return nn.Sequential(nn.Identity(), nn.ModuleDict({"router": Router()})["router"])


def route_cost(call: Call) -> Cost:
    x, w = call.arg("x"), call.arg("w")
    return Cost("matmul", flops=2 * x.shape[0] * w.numel(), vector_ops=5 * call.out.numel())


def test_an_operator_without_a_rule_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(UnknownOperator) as caught:
        trace(routed(), torch.randn(3, 8))
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert "workload_test.route" in message
    assert "module '1'" in message
    assert "register_rule('workload_test.route'" in message


@pytest.mark.parametrize(
    "name", ["workload_test::route", "workload_test.route", "workload_test::route.default", "op", "packet"]
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_registered_rule_counts_a_custom_operator(rules: None, name: str, device: str) -> None:
    op: Any = {"op": route, "packet": torch.ops.workload_test.route}.get(name, name)
    register_rule(op, route_cost)
    work = trace(routed().to(device), torch.randn(3, 8, device=device))
    (row,) = work.ops
    assert (row.name, row.module, row.kind, row.flops, row.vector_ops) == (
        "workload_test.route",
        "1",
        "matmul",
        2 * 96,
        60,
    )
    assert (row.bytes_read, row.bytes_written) == (4 * (24 + 32), 4 * 12)
    assert work.num_parameters == 32


def test_a_rule_can_be_a_decorator_and_replace_a_built_in_one(rules: None) -> None:
    @register_rule("aten.relu")
    def free(call: Call) -> Cost:
        return Cost("vector", vector_ops=0, bytes_read=7, bytes_written=8)

    (op,) = trace(F.relu, meta(4)).ops
    assert (op.vector_ops, op.bytes_read, op.bytes_written) == (0, 7, 8)


def test_a_cost_must_be_of_a_known_kind_and_not_negative() -> None:
    with pytest.raises(ValueError, match="matmul, conv, attention"):
        Cost("gemm")
    with pytest.raises(ValueError, match="negative"):
        Cost("vector", vector_ops=-1)


def test_every_view_is_one_for_torch_too() -> None:
    """Each name in the list of free views is an alias by its schema, apart from those that torch documents as unsafe views."""
    for name in VIEWS - {"aten._unsafe_view", "aten.unsafe_split", "aten.unsafe_split_with_sizes"}:
        packet = getattr(torch.ops.aten, name.removeprefix("aten."))
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        aliased = [schema for schema in schemas if schema.arguments[0].alias_info is not None]
        assert aliased, name


@pytest.mark.parametrize(
    ("step", "operator"),
    [
        (lambda x: x.nonzero(), "aten.nonzero"),
        (lambda x: x[x > 0], "aten.index"),
        (lambda x: x.masked_select(x > 0), "aten.masked_select"),
        (lambda x: x * x.sum().item(), "aten._local_scalar_dense"),
        (lambda x: x if x.sum() > 0 else -x, "aten._local_scalar_dense"),
        (lambda x: torch.bincount(x.argmax(-1)), "aten.bincount"),
        (lambda x: x.repeat_interleave(x.argmax(-1), 0), "aten.repeat_interleave"),
        (lambda x: torch.unique(x), "aten._unique2"),
        (lambda x: F.one_hot(x.argmax(-1)), "aten._local_scalar_dense"),
        (lambda x: x.argmax(-1).tolist(), ""),
        (lambda x: x.numpy(), ""),
    ],
)
def test_values_of_meta_tensors_are_an_error_that_names_operator_and_module(step: Any, operator: str) -> None:
    class Dynamic(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return step(x)

    model = nn.Sequential(nn.Linear(8, 8, device="meta"), Dynamic())
    with pytest.raises(NeedsValues) as caught:
        trace(model, meta(4, 8))
    assert "module '1'" in str(caught.value)
    assert operator in str(caught.value)
    assert "real device" in str(caught.value)


def test_values_of_real_tensors_are_fine() -> None:
    work = trace(lambda x: x[x > 0] * x.sum().item(), torch.ones(4, 8))
    host = next(op for op in work.ops if op.name == "aten._local_scalar_dense")
    assert (host.kind, host.bytes_read, host.bytes_written) == ("copy", 4, 0)


def test_errors_of_the_model_are_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="7"):
        trace(nn.Linear(8, 8, device="meta"), meta(4, 7))
    with pytest.raises(ZeroDivisionError):
        trace(lambda x: x / (1 // 0), meta(4))


def test_inputs_on_another_device_than_a_meta_model() -> None:
    with pytest.raises(UserError, match=re.escape("shape (4, 8)")):
        trace(nn.Linear(8, 8, device="meta"), torch.randn(4, 8))


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(UserError, match="dense"):
        trace(torch.relu, torch.eye(3).to_sparse())


def test_meta_model_builds_without_memory() -> None:
    model = meta_model(nn.Linear, 1 << 20, 1 << 20, bias=False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert trace(model, meta(1, 1 << 20)).macs == 1 << 40


def test_inference_mode_gives_the_same_table() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())
    x = torch.randn(2, 3, 8)
    plain = trace(model, x)
    with torch.inference_mode():
        assert trace(model, x).ops == plain.ops


def test_tracing_leaves_no_mark() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[2].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    for training in (True, False):
        trace(model, torch.ones(2, 3, 4, 4), training=training)
    assert torch.rand(()) == expected
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_dropout_runs_in_training_only() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    assert set(trace(model, torch.randn(2, 8)).by_op()) == {"aten.addmm"}
    assert "aten.bernoulli_" in trace(model, torch.randn(2, 8), training=True).by_op()


def test_tied_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 8)
            self.head = nn.Linear(8, 100, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(3, dtype=torch.float64))

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(i))

    work = trace(Tied(), torch.tensor([1, 2]))
    assert (work.num_parameters, work.parameter_bytes, work.buffer_bytes) == (800, 3200, 24)


def test_modules_of_a_callable_are_named_by_their_class() -> None:
    first, second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2))
    work = trace(lambda x: second(first(first(x))).relu(), torch.randn(3, 4))
    assert [op.module for op in work.ops] == ["Linear", "Linear", "Sequential.0", ""]
    assert work.num_parameters == 20 + 10
    assert {held.name for held in work.parameters} == {
        "Linear.weight",
        "Linear.bias",
        "Sequential.0.weight",
        "Sequential.0.bias",
    }
    twins = trace(lambda x: nn.Linear(4, 4)(first(x)), torch.randn(3, 4))
    assert {op.module for op in twins.ops if op.kind == "matmul"} == {"Linear", "Linear_2"}


def test_a_module_outside_the_tree_is_named_below_its_caller() -> None:
    hidden = [nn.Linear(4, 4)]

    class Caller(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return hidden[0](x)

    work = trace(nn.Sequential(Caller()), torch.randn(3, 4))
    assert work.ops[0].module == "0.Linear"
    assert work.num_parameters == 20  # it is not in the tree, yet it is used


def test_the_place_is_right_after_a_module_raised_and_was_caught() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails = Fails()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.fails(x)
            except ValueError:
                return x

    class Goes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tries = Tries()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.tries(x) * 2

    work = trace(nn.Sequential(Goes(), nn.ReLU()), torch.randn(3))
    assert [(op.name, op.module) for op in work.ops] == [("aten.mul", "0"), ("aten.relu", "1")]


def test_a_callable_keeps_the_modes_of_its_modules() -> None:
    norm = nn.BatchNorm1d(4).eval()
    frozen = trace(lambda x: norm(x), torch.randn(8, 4), training=True)
    assert "aten.add_" not in frozen.by_op()  # no batch is counted
    assert "aten.add_" in trace(norm, torch.randn(8, 4), training=True).by_op()
