"""The trace itself: errors that name their place, rules for custom operators, names of modules, no side effects, the table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from shared.errors import UserError
from shared.workload import (
    KINDS,
    Call,
    Cost,
    Held,
    NeedsValues,
    Op,
    UnknownOperator,
    Workload,
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
    assert torch.backends.mha.get_fastpath_enabled()
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

    work = trace(nn.Sequential(Tries(), nn.ReLU()), torch.randn(3))
    assert [op.module for op in work.ops] == ["1"]


def test_loops_over_time_count_every_step() -> None:
    """A leaky integrate-and-fire neuron: decay, add, compare, reset."""

    def spikes(current: torch.Tensor) -> torch.Tensor:
        v = torch.zeros_like(current[0])
        out = []
        for step in current:
            v = 0.9 * v + step
            fired = (v > 1).float()
            v = v * (1 - fired)
            out.append(fired)
        return torch.stack(out)

    steps, n = 7, 30
    work = trace(spikes, meta(steps, n))
    assert work.by_op()["aten.gt"].num_ops == steps
    # 0.9·v, + step, v > 1, 1 - fired, v·(1 - fired); the cast and the stack are copies
    assert work.by_kind()["vector"].vector_ops == steps * 5 * n
    assert work.by_kind()["copy"].bytes_written == 4 * n + steps * 4 * n + 4 * steps * n


def test_a_hash_grid_encoder() -> None:
    """Eight corners a point and level, hashed by xor of products, looked up and blended."""
    points, levels, size, features = 50, 4, 1 << 14, 2

    def encode(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        out = []
        for level in range(levels):
            scaled = x * 16 * 1.5**level
            cell = scaled.floor()
            offset = (scaled - cell)[:, None]
            corners = torch.stack(torch.meshgrid(*[torch.arange(2, device=x.device)] * 3, indexing="ij"), -1).view(8, 3)
            at = cell.long()[:, None] + corners
            index = ((at[..., 0] * 1) ^ (at[..., 1] * 2_654_435_761) ^ (at[..., 2] * 805_459_861)) % size
            weight = torch.where(corners.bool(), offset, 1 - offset).prod(-1, keepdim=True)
            out.append((table[level][index] * weight).sum(1))
        return torch.cat(out, -1)

    for device in ("cpu", "meta"):
        work = trace(encode, torch.rand(points, 3, device=device), torch.randn(levels, size, features, device=device))
        looked_up = work.by_kind()["gather"]
        corners = levels * points * 8
        assert looked_up.bytes_read == corners * (4 * features + 8)  # the features and the index of each corner
        assert looked_up.bytes_written == corners * 4 * features
        assert work.by_op()["aten.bitwise_xor"].vector_ops == 2 * corners
        assert work.macs == 0


EVERYTHING = {
    "conv_transpose": lambda x: F.conv_transpose2d(x, x.new_ones(4, 3, 2, 2), stride=2),
    "conv1d": lambda x: F.conv1d(x[..., 0], x.new_ones(5, 4, 3)),
    "conv3d": lambda x: F.conv3d(x[:, :, None], x.new_ones(5, 4, 1, 3, 3)),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", antialias=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "area": lambda x: F.interpolate(x, size=(3, 3), mode="area"),
    "grid_sample": lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False),
    "group_norm": lambda x: F.group_norm(x, 2),
    "instance_norm": F.instance_norm,
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "normalize": F.normalize,
    "pools": lambda x: F.max_pool2d(F.avg_pool2d(x, 2), 2) + F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2),
    "unfold_fold": lambda x: F.fold(F.unfold(x, 3), (8, 8), 3),
    "pads": lambda x: F.pad(F.pad(x, (1, 1, 1, 1), mode="reflect"), (1, 1, 1, 1), mode="replicate"),
    "shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "activations": lambda x: sum(f(x) for f in (F.mish, F.elu, F.selu, F.softplus, F.leaky_relu, F.hardswish, F.logsigmoid, F.tanhshrink)),
    "glu": lambda x: F.glu(x, 1),
    "losses": lambda x: F.mse_loss(x, x * 2) + F.smooth_l1_loss(x, x * 2) + F.huber_loss(x, x * 2) + F.l1_loss(x, x * 2),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).float()) + F.binary_cross_entropy(x.sigmoid(), (x > 0).float()),
    "divergence": lambda x: F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean"),
    "cross_entropy": lambda x: F.cross_entropy(x, x.argmax(1), label_smoothing=0.1),
    "sort": lambda x: x.sort(1).values + x.topk(4, 1).values + x.gather(1, x.argsort(1)),
    "scans": lambda x: x.cumsum(1) + x.cumprod(1) + x.cummax(1).values + x.logcumsumexp(1),
    "scatters": lambda x: torch.zeros_like(x).scatter_add(1, x.argsort(1), x).index_add(0, x.new_zeros(2, dtype=torch.long), x),
    "reduce": lambda x: x.scatter_reduce(1, x.argsort(1), x, "mean") + x.logsumexp(1, True) + x.std(1, keepdim=True) + x.norm(),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x),
    "dropout": lambda x: F.dropout2d(F.dropout(x, 0.3), 0.3),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * 2),
    "surrogate": lambda x: x + (x.round() - x).detach(),
    "lerp": lambda x: torch.lerp(x, x * 2, 0.3) + torch.addcmul(x, x, x) + torch.where(x > 0, x, 0.0),
    "cosine": lambda x: F.cosine_similarity(x, x.flip(0).roll(1, 1)),
    "recurrent": lambda x: nn.GRU(8, 4, device=x.device)(x.flatten(0, 1))[0],
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", EVERYTHING)
def test_operators_of_the_papers_have_rules_in_both_passes(name: str, device: str) -> None:
    x = torch.randn(2, 4, 8, 8, device=device, requires_grad=True)
    function = EVERYTHING[name]
    forward = trace(function, x)
    assert forward.ops
    work = trace(lambda: function(x).sum().backward(), training=True)
    assert work.by_phase()["backward"].bytes > 0


def op(**changes: Any) -> Op:
    row = {"name": "aten.mm", "module": "a.b", "kind": "matmul", "phase": "forward", "dtype": "float32"}
    figures = {"flops": 10, "vector_ops": 2, "bytes_read": 30, "bytes_written": 4, "count": 1}
    return Op(**(row | figures | changes))


OPS = st.builds(
    op,
    name=st.sampled_from(["aten.mm", "aten.add"]),
    module=st.sampled_from(["", "a", "a.b", "a.c", "ab"]),
    kind=st.sampled_from(KINDS),
    phase=st.sampled_from(["forward", "backward"]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    flops=st.integers(0, 3).map(lambda n: 2 * n),
    vector_ops=st.integers(0, 2),
    count=st.integers(1, 3),
)
WORKLOADS = st.builds(Workload, st.lists(OPS, max_size=12).map(tuple))


@given(a=WORKLOADS, b=WORKLOADS, times=st.integers(1, 5))
def test_sums_and_multiples(a: Workload, b: Workload, times: int) -> None:
    for figure in ("flops", "macs", "vector_ops", "bytes"):
        assert getattr(a + b, figure) == getattr(a, figure) + getattr(b, figure)
        assert getattr(a * times, figure) == getattr(times * a, figure) == times * getattr(a, figure)


@given(work=WORKLOADS, depth=st.integers(1, 3))
def test_every_grouping_and_the_compressed_form_keep_the_totals(work: Workload, depth: int) -> None:
    for groups in (work.by_kind(), work.by_phase(), work.by_op(), work.by_module(depth)):
        assert sum(totals.flops for totals in groups.values()) == work.flops
        assert sum(totals.bytes for totals in groups.values()) == work.bytes
        assert sum(totals.num_ops for totals in groups.values()) == work.totals.num_ops
    compressed = work.compressed()
    assert compressed.totals == work.totals
    assert compressed.by_kind() == work.by_kind()
    assert compressed.compressed().ops == compressed.ops
    costs = [(row.name, row.kind, row.phase, row.dtype, row.flops, row.vector_ops) for row in compressed.ops]
    assert len(set(costs)) == len(costs)


@given(work=WORKLOADS)
def test_arrays_hold_the_rows(work: Workload) -> None:
    arrays = work.arrays()
    for figure in ("flops", "vector_ops", "bytes_read", "bytes_written"):
        assert arrays[figure].dtype == np.float64
        assert arrays[figure] @ arrays["count"] == getattr(work.totals, figure)
    assert [arrays["dtypes"][i] for i in arrays["dtype_id"]] == list(arrays["dtype"]) == [row.dtype for row in work.ops]
    assert arrays["kind"] == tuple(row.kind for row in work.ops)


def test_a_multiple_is_a_positive_integer() -> None:
    work = Workload((op(),))
    with pytest.raises(ValueError, match="0 times"):
        work * 0
    with pytest.raises(TypeError):
        work * 1.5  # type: ignore[operator]
    with pytest.raises(TypeError):
        work + 1  # type: ignore[operator]


def test_repeating_work_holds_its_memory_once_and_adding_parts_holds_both() -> None:
    part = Workload((op(),), (Held("w", 3, 12),), (Held("b", 1, 8),), (Held("", 5, 20),))
    assert [(part * 3).parameter_bytes, (part * 3).buffer_bytes, (part * 3).saved_bytes] == [12, 8, 20]
    both = part + part
    assert [both.num_parameters, both.parameter_bytes, both.buffer_bytes, both.saved_bytes] == [6, 24, 16, 40]


def test_merged_rows_keep_the_path_that_they_share() -> None:
    work = Workload((op(module="a.b.x"), op(module="a.c", count=2), op(module="a.b.y"), op(flops=12)))
    first, second = work.compressed().ops
    assert (first.module, first.count) == ("a", 4)
    assert (second.module, second.count) == ("a.b", 1)


def test_within_does_not_take_names_that_only_begin_alike() -> None:
    work = Workload((op(module="a"), op(module="a.b"), op(module="ab")), (Held("a.w", 1, 4), Held("ab.w", 1, 4)))
    assert [row.module for row in work.within("a").ops] == ["a", "a.b"]
    assert work.within("a").num_parameters == 1
    assert work.within("") == work


def test_the_dict_is_json_and_the_table_prints() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    work = trace(model, torch.randn(2, 8), training=True)
    data = json.loads(json.dumps(work.to_dict()))
    assert (data["macs"], data["num_parameters"], data["saved_bytes"]) == (256, 144, work.saved_bytes)
    assert sum(row["flops"] * row["count"] for row in data["ops"]) == work.flops
    assert [row["count"] for row in data["ops"] if row["name"] == "aten.addmm"] == [2]
    text = str(work)
    assert "144 parameters" in text
    assert "total" in text
    console = Console(record=True, width=100)
    console.print(work.table("kind"), work)
    assert "matmul" in console.export_text()
    assert "3 calls" in repr(work)
