"""Vector and memory operators against closed forms worked by hand: vector operations and bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shared.workload import Op, trace

F4, I8 = 4, 8  # bytes of a float32, of an int64


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def ids(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int64)


def only(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Op:
    ops = trace(function, *inputs, **kwargs).ops
    assert len(ops) == 1, [op.name for op in ops]
    return ops[0]


def cost(op: Op) -> tuple[str, int, int, int, int]:
    return op.kind, op.flops, op.vector_ops, op.bytes_read, op.bytes_written


@pytest.mark.parametrize(
    ("function", "per_element", "operands"),
    [
        (torch.add, 1, 2),
        (torch.mul, 1, 2),
        (torch.maximum, 1, 2),
        (F.relu, 1, 1),
        (torch.exp, 1, 1),
        (torch.sigmoid, 1, 1),
        (F.gelu, 5, 1),
        (lambda x: F.gelu(x, approximate="tanh"), 9, 1),
        (F.silu, 2, 1),
        (F.hardswish, 5, 1),
        (F.relu6, 2, 1),
        (lambda x: x.clamp(0, 1), 2, 1),
        (lambda x, y: torch.add(x, y, alpha=0.5), 2, 2),
        (lambda x: torch.softmax(x, -1), 5, 1),
        (lambda x: torch.log_softmax(x, 0), 5, 1),
    ],
)
def test_elementwise(function: Callable[..., Any], per_element: int, operands: int) -> None:
    n = 6 * 8
    op = only(function, *(meta(6, 8) for _ in range(operands)))
    assert cost(op) == ("vector", 0, per_element * n, operands * F4 * n, F4 * n)


def test_a_broadcast_operand_is_read_once() -> None:
    op = only(torch.add, meta(6, 8), meta(8))
    assert cost(op) == ("vector", 0, 48, F4 * (48 + 8), F4 * 48)
    expanded = only(torch.add, meta(6, 8), meta(1, 8).expand(6, 8))
    assert cost(expanded) == cost(op)
    row_of_a_larger_one = only(torch.add, meta(6, 8), meta(100, 8)[:1].expand(6, 8))
    assert cost(row_of_a_larger_one) == cost(op)


def test_the_same_tensor_twice_is_read_once() -> None:
    x = meta(6, 8)
    assert only(torch.mul, x, x).bytes_read == F4 * 48


def test_a_slice_reads_its_own_elements() -> None:
    assert only(torch.exp, meta(100, 8)[:5]).bytes_read == F4 * 40
    assert only(torch.exp, meta(100, 8)[:, ::2]).bytes_read == F4 * 400


def test_in_place_reads_and_writes_its_target() -> None:
    op = only(lambda x, y: x.add_(y), meta(6, 8), meta(6, 8))
    assert cost(op) == ("vector", 0, 48, 2 * F4 * 48, F4 * 48)
    assert cost(only(lambda x: F.relu_(x), meta(6, 8))) == ("vector", 0, 48, F4 * 48, F4 * 48)


def test_what_is_overwritten_is_not_read() -> None:
    assert cost(only(lambda x, y: x.copy_(y), meta(6, 8), meta(6, 8))) == ("copy", 0, 0, F4 * 48, F4 * 48)
    assert cost(only(lambda x: x.zero_(), meta(6, 8))) == ("copy", 0, 0, 0, F4 * 48)
    assert cost(only(torch.zeros_like, meta(6, 8))) == ("copy", 0, 0, 0, F4 * 48)
    assert cost(only(lambda x: x.normal_(), meta(6, 8))) == ("vector", 0, 48, 0, F4 * 48)
    out = meta(6, 8)
    assert only(lambda x: torch.exp(x, out=out), meta(6, 8)).bytes_read == F4 * 48


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(8, 6),
        lambda x: x.t(),
        lambda x: x[1:3, None].expand(2, 5, 8),
        lambda x: x.unbind(0)[0].detach(),
        lambda x: x.split(2)[0].squeeze(0),
        lambda x: x.unfold(1, 4, 2).permute(2, 0, 1),
        lambda x: torch.empty_like(x),
    ],
)
def test_views_and_allocation_cost_nothing(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert trace(view, meta(6, 8)).ops == ()


def test_a_reshape_that_must_copy_is_a_copy() -> None:
    assert cost(only(lambda x: x.t().reshape(-1), meta(6, 8))) == ("copy", 0, 0, F4 * 48, F4 * 48)


def test_a_cast_writes_the_new_type() -> None:
    assert cost(only(lambda x: x.bfloat16(), meta(6, 8))) == ("copy", 0, 0, 4 * 48, 2 * 48)


def test_reductions_count_what_they_read() -> None:
    assert cost(only(lambda x: x.sum(-1), meta(6, 8))) == ("vector", 0, 48, F4 * 48, F4 * 6)
    assert cost(only(lambda x: x.amax(0), meta(6, 8))) == ("vector", 0, 48, F4 * 48, F4 * 8)
    assert cost(only(lambda x: x.max(-1), meta(6, 8))) == ("vector", 0, 48, F4 * 48, (F4 + I8) * 6)
    assert cost(only(lambda x: x.argmax(-1), meta(6, 8))) == ("vector", 0, 48, F4 * 48, I8 * 6)
    assert cost(only(lambda x: x.var(-1), meta(6, 8))) == ("vector", 0, 4 * 48, F4 * 48, F4 * 6)
    assert cost(only(lambda x: x.cumsum(-1), meta(6, 8))) == ("vector", 0, 48, F4 * 48, F4 * 48)


def test_layer_norm() -> None:
    tokens, d = 10, 16
    op = only(nn.LayerNorm(d, device="meta"), meta(tokens, d))
    # mean 1; subtract, square, add 3; subtract, scale 2; weight and bias 2. Written: result, mean and 1/std of each token.
    assert cost(op) == ("vector", 0, 8 * tokens * d, F4 * (tokens * d + 2 * d), F4 * (tokens * d + 2 * tokens))
    plain = only(nn.LayerNorm(d, elementwise_affine=False, device="meta"), meta(tokens, d))
    assert plain.vector_ops == 6 * tokens * d


def test_batch_norm_in_train_and_eval_mode() -> None:
    layer = nn.BatchNorm2d(3, device="meta")
    n = 2 * 3 * 25
    evaluated = only(layer, meta(2, 3, 5, 5))
    assert cost(evaluated) == ("vector", 0, 2 * n, F4 * (n + 4 * 3), F4 * n)
    trained = {op.name: op for op in trace(layer, meta(2, 3, 5, 5), training=True).ops}
    norm = trained["aten.native_batch_norm"]
    # also read: weight, bias and the running statistics; also written: mean, 1/std, the running statistics
    assert cost(norm) == ("vector", 0, 8 * n, F4 * (n + 4 * 3), F4 * (n + 4 * 3))
    assert trained["aten.add_"].bytes_written == I8  # the number of batches


def test_group_norm() -> None:
    op = only(nn.GroupNorm(2, 4, device="meta"), meta(3, 4, 5, 5))
    assert (op.kind, op.vector_ops) == ("vector", 8 * 300)


def test_pooling() -> None:
    assert only(nn.AvgPool2d(2), meta(1, 3, 8, 8)).vector_ops == 4 * 3 * 16
    pooled = only(nn.MaxPool2d(3, stride=2, padding=1), meta(1, 3, 8, 8))
    assert cost(pooled) == ("vector", 0, 9 * 48, F4 * 192, (F4 + I8) * 48)
    assert only(nn.AdaptiveAvgPool2d(2), meta(1, 3, 8, 8)).vector_ops == 192


@pytest.mark.parametrize(
    ("mode", "per_element"), [("nearest", 0), ("bilinear", 2 * 4 - 1), ("bicubic", 2 * 16 - 1)]
)  # fmt: skip
def test_upsampling(mode: str, per_element: int) -> None:
    op = only(lambda x: F.interpolate(x, scale_factor=2, mode=mode), meta(1, 3, 4, 4))
    assert (op.vector_ops, op.bytes_read, op.bytes_written) == (per_element * 192, F4 * 48, F4 * 192)
    assert op.kind == ("copy" if mode == "nearest" else "vector")


def test_antialiased_shrinking_widens_the_filter() -> None:
    op = only(lambda x: F.interpolate(x, size=(2, 8), mode="bilinear", antialias=True), meta(1, 1, 8, 8))
    # width keeps its size: 2 taps on an 8 x 8 map; height shrinks fourfold: 8 taps for 2 x 8 results
    assert op.vector_ops == 64 * (2 * 2 - 1) + 16 * (2 * 8 - 1)


def test_gathers_read_what_they_pick() -> None:
    rows = ("gather", 0, 0, F4 * 3 * 8 + I8 * 3, F4 * 3 * 8)
    assert cost(only(lambda x, i: x[i], meta(1000, 8), ids(3))) == rows
    assert cost(only(lambda x, i: x.index_select(0, i), meta(1000, 8), ids(3))) == rows
    assert cost(only(F.embedding, ids(3), meta(1000, 8))) == rows
    elements = only(lambda x, i: x.gather(1, i), meta(6, 1000), ids(6, 2))
    assert cost(elements) == ("gather", 0, 0, (F4 + I8) * 12, F4 * 12)


def test_scatters_write_what_they_pick() -> None:
    moved, index = F4 * 3 * 8, I8 * 3
    added = only(lambda x, i, y: x.index_add_(0, i, y), meta(1000, 8), ids(3), meta(3, 8))
    assert cost(added) == ("gather", 0, 24, 2 * moved + index, moved)
    put = only(lambda x, i, y: x.index_put_((i,), y), meta(1000, 8), ids(3), meta(3, 8))
    assert cost(put) == ("gather", 0, 0, moved + index, moved)
    accumulated = only(lambda x, i, y: x.index_put_((i,), y, accumulate=True), meta(1000, 8), ids(3), meta(3, 8))
    assert cost(accumulated) == cost(added)
    copied = only(lambda x, i, y: x.index_copy_(0, i, y), meta(1000, 8), ids(3), meta(3, 8))
    assert cost(copied) == cost(put)
    spread = only(lambda x, i, y: x.scatter_add_(0, i, y), meta(1000, 8), ids(3, 8), meta(3, 8))
    assert cost(spread) == ("gather", 0, 24, 2 * moved + I8 * 24, moved)


def test_a_scatter_that_is_not_in_place_copies_its_target_too() -> None:
    inputs = (meta(1000, 8), ids(3), meta(3, 8))
    inside = only(lambda x, i, y: x.index_add_(0, i, y), *inputs)
    outside = only(lambda x, i, y: x.index_add(0, i, y), *inputs)
    assert outside.bytes_read == inside.bytes_read + F4 * 8000
    assert outside.bytes_written == inside.bytes_written + F4 * 8000


def test_masks_count_their_true_values() -> None:
    mask = torch.tensor([True, False, True, True, False, False])
    picked = trace(lambda x: x[mask], torch.randn(6, 8)).ops[-1]
    assert picked.bytes_written == F4 * 3 * 8
    put = only(lambda x, value: x.index_put_((mask,), value), torch.randn(6, 8), torch.zeros(()))
    assert cost(put) == ("gather", 0, 0, F4 + 6, F4 * 3 * 8)  # one value, a mask of six bytes


def test_an_index_put_with_gaps_broadcasts_its_indices() -> None:
    def put(x: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.index_put_(x, [i, None, j], torch.zeros((), device="meta"))

    op = next(op for op in trace(put, meta(9, 6, 5), ids(2, 1), ids(3)).ops if op.name == "aten.index_put_")
    assert op.bytes_written == F4 * (2 * 3) * 6


def test_embedding_gradient_clears_the_table_and_adds_rows() -> None:
    table = torch.randn(100, 8, requires_grad=True)
    work = trace(lambda: F.embedding(torch.tensor([1, 2, 2]), table).backward(torch.ones(3, 8)), training=True)
    op = next(op for op in work.ops if op.name == "aten.embedding_dense_backward")
    rows = F4 * 3 * 8
    assert cost(op) == ("gather", 0, 24, 2 * rows + I8 * 3, F4 * 800 + rows)


def test_sorting_and_search() -> None:
    sort = only(lambda x: x.sort(-1), meta(6, 1000))
    assert cost(sort) == ("gather", 0, 6000 * 10, F4 * 6000, (F4 + I8) * 6000)  # 2^10 = 1024
    best = only(lambda x: x.topk(4), meta(6, 1000))
    assert cost(best) == ("gather", 0, 6000 * 2, F4 * 6000, (F4 + I8) * 24)
    search = only(lambda e, x: torch.searchsorted(e, x), meta(255), meta(10))
    assert search.vector_ops == 10 * 8
    assert search.bytes_read == F4 * (80 + 10)
    count = only(torch.bincount, torch.tensor([0, 1, 1, 3]))
    assert cost(count) == ("gather", 0, 4, I8 * 4, I8 * 4)


def test_grid_sample_reads_four_taps_a_point() -> None:
    def sample(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(x, grid, align_corners=False)

    op = only(sample, meta(1, 3, 8, 8), meta(1, 5, 5, 2))
    values = 3 * 25
    assert cost(op) == ("gather", 0, 7 * values, F4 * (4 * values + 50), F4 * values)


def test_cross_entropy_reads_one_log_probability_a_row() -> None:
    work = trace(F.cross_entropy, meta(6, 1000), ids(6))
    softmax, loss = work.ops
    assert softmax.vector_ops == 5 * 6000
    assert (loss.kind, loss.bytes_read) == ("gather", F4 * 6 + I8 * 6)


def test_copies_concatenation_and_padding() -> None:
    assert cost(only(lambda x, y: torch.cat([x, y]), meta(2, 8), meta(3, 8))) == ("copy", 0, 0, F4 * 40, F4 * 40)
    assert cost(only(lambda x: F.pad(x, (1, 1)), meta(6, 8))) == ("copy", 0, 0, F4 * 48, F4 * 60)
    assert cost(only(lambda x: x.roll(1, 0), meta(6, 8))) == ("copy", 0, 0, F4 * 48, F4 * 48)
