"""Matrix products and convolutions against closed forms worked by hand: FLOPs, bytes, types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from shared.workload import Op, trace

F4 = 4  # bytes of a float32


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def only(function: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Op:
    ops = trace(function, *inputs, **kwargs).ops
    assert len(ops) == 1, [op.name for op in ops]
    return ops[0]


def cost(op: Op) -> tuple[str, int, int, int, int]:
    return op.kind, op.flops, op.vector_ops, op.bytes_read, op.bytes_written


def test_linear_is_two_flops_per_mac_and_one_addition_of_the_bias() -> None:
    tokens, wide, narrow = 10, 32, 16
    layer = nn.Linear(wide, narrow, device="meta")
    op = only(layer, meta(2, 5, wide))
    read = F4 * (tokens * wide + wide * narrow + narrow)
    assert cost(op) == ("matmul", 2 * tokens * wide * narrow, tokens * narrow, read, F4 * tokens * narrow)
    assert op.name == "aten.addmm"
    assert op.dtype == "float32"


def test_linear_without_bias_has_no_vector_operations() -> None:
    op = only(nn.Linear(32, 16, bias=False, device="meta"), meta(10, 32))
    assert cost(op) == ("matmul", 2 * 10 * 32 * 16, 0, F4 * (10 * 32 + 32 * 16), F4 * 10 * 16)


def test_half_precision_halves_the_bytes_and_not_the_flops() -> None:
    full = only(nn.Linear(32, 16, device="meta"), meta(10, 32))
    half = only(nn.Linear(32, 16, device="meta", dtype=torch.bfloat16), meta(10, 32, dtype=torch.bfloat16))
    assert half.dtype == "bfloat16"
    assert half.flops == full.flops
    assert 2 * half.bytes_read == full.bytes_read
    assert 2 * half.bytes_written == full.bytes_written


def test_autocast_books_the_casts() -> None:
    layer = nn.Linear(32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        work = trace(layer, torch.randn(10, 32))
    casts = [op for op in work.ops if op.kind == "copy"]
    assert {(op.bytes_read, op.bytes_written) for op in casts} == {
        (4 * n, 2 * n) for n in (10 * 32, 32 * 16, 16)
    }  # fmt: skip
    assert [op.dtype for op in work.ops if op.kind == "matmul"] == ["bfloat16"]


def test_batched_products() -> None:
    op = only(torch.matmul, meta(3, 4, 5, 6), meta(3, 4, 6, 7))
    assert cost(op) == ("matmul", 2 * 12 * 5 * 6 * 7, 0, F4 * 12 * (5 * 6 + 6 * 7), F4 * 12 * 5 * 7)


@pytest.mark.parametrize(
    ("function", "shapes", "macs", "added"),
    [
        (torch.mv, [(5, 6), (6,)], 30, 0),
        (torch.dot, [(6,), (6,)], 6, 0),
        (torch.addmv, [(5,), (5, 6), (6,)], 30, 5),
        (torch.baddbmm, [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 120, 30),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 120, 15),
    ],
)
def test_other_products(function: Callable[..., Any], shapes: list[tuple[int, ...]], macs: int, added: int) -> None:
    op = only(function, *(meta(*shape) for shape in shapes))
    assert (op.kind, op.flops, op.vector_ops) == ("matmul", 2 * macs, added)


def grouped(a: torch.Tensor, b: torch.Tensor, groups: int) -> Op:
    ends = torch.arange(1, groups + 1, dtype=torch.int32) * 16
    half = torch.bfloat16
    return only(torch._grouped_mm, a.to(half), b.to(half), offs=ends)


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (torch.mm, [(3, 5), (5, 7)], (1, 3, 7, 5)),
        (torch.addmm, [(7,), (3, 5), (5, 7)], (1, 3, 7, 5)),  # the added row has no k
        (torch.bmm, [(2, 3, 5), (2, 5, 7)], (2, 3, 7, 5)),
        (torch.baddbmm, [(2, 3, 7), (2, 3, 5), (2, 5, 7)], (2, 3, 7, 5)),
        (nn.Conv2d(4, 6, 3, 2, 1, bias=False).to("meta"), [(2, 4, 8, 10)], (1, 2 * 4 * 5, 6, 36, 4 * 5)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False).to("meta"), [(2, 4, 8, 10)], (2, 2 * 6 * 8, 3, 18, 6 * 8)),
    ],
)
def test_shapes_of_products(
    function: Callable[..., Any], shapes: list[tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    assert only(function, *(meta(*shape) for shape in shapes)).shape == expected


def test_grouped_products_tell_groups_of_equal_size() -> None:
    a, b = meta(12, 8, dtype=torch.bfloat16), meta(3, 8, 16, dtype=torch.bfloat16)
    offsets = torch.tensor([4, 8, 12], dtype=torch.int32, device="meta")
    assert only(torch._grouped_mm, a, b, offs=offsets).shape == (3, 4, 16, 8)


def test_grouped_products_count_each_row_once() -> None:
    tokens, groups, d, h = 64, 4, 32, 48
    rows = grouped(torch.randn(tokens, d), torch.randn(groups, d, h), groups)
    assert rows.flops == 2 * tokens * d * h  # not multiplied by the number of groups
    assert rows.bytes_read == 2 * (tokens * d + groups * d * h) + 4 * groups
    assert rows.bytes_written == 2 * tokens * h
    weight_gradient = grouped(torch.randn(tokens, d).t(), torch.randn(tokens, h), groups)
    assert weight_gradient.flops == 2 * tokens * d * h
    assert weight_gradient.bytes_written == 2 * groups * d * h


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
def test_grouped_products_on_meta_equal_those_on_the_cpu() -> None:
    def run(device: str) -> Op:
        a = torch.empty(64, 32, dtype=torch.bfloat16, device=device)
        b = torch.empty(4, 32, 48, dtype=torch.bfloat16, device=device)
        return only(torch._grouped_mm, a, b, offs=torch.tensor([16, 32, 48, 64], dtype=torch.int32, device=device))

    assert run("meta") == run("cpu")


@pytest.mark.parametrize(
    ("layer", "size", "macs", "out"),
    [
        (nn.Conv2d(3, 8, 3, padding=1, bias=False), (2, 3, 10, 12), 2 * 10 * 12 * 8 * 27, (2, 8, 10, 12)),
        (nn.Conv2d(3, 8, 3, stride=2, bias=False), (2, 3, 11, 13), 2 * 5 * 6 * 8 * 27, (2, 8, 5, 6)),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False), (2, 8, 7, 7), 2 * 49 * 8 * 25, (2, 8, 7, 7)),
        (nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), (1, 8, 7, 7), 49 * 12 * 2 * 9, (1, 12, 7, 7)),
        (nn.Conv2d(4, 4, 3, dilation=2, bias=False), (1, 4, 9, 9), 25 * 4 * 4 * 9, (1, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, bias=False), (2, 4, 10), 2 * 8 * 6 * 4 * 3, (2, 6, 8)),
        (nn.Conv3d(2, 3, (1, 2, 3), bias=False), (1, 2, 4, 5, 6), 4 * 4 * 4 * 3 * 2 * 6, (1, 3, 4, 4, 4)),
        # every input position meets the whole kernel
        (nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False), (2, 6, 5, 5), 2 * 25 * 6 * 4 * 4, (2, 4, 10, 10)),
        (
            nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=6, bias=False),
            (1, 6, 5, 5),
            25 * 6 * 16,
            (1, 6, 10, 10),
        ),
        (nn.ConvTranspose1d(4, 2, 3, bias=False), (1, 4, 5), 5 * 4 * 2 * 3, (1, 2, 7)),
    ],
)
def test_convolutions(layer: nn.Module, size: tuple[int, ...], macs: int, out: tuple[int, ...]) -> None:
    weight = sum(p.numel() for p in layer.parameters())
    op = only(layer.to("meta"), meta(*size))
    numel_in, numel_out = torch.Size(size).numel(), torch.Size(out).numel()
    assert cost(op) == ("conv", 2 * macs, 0, F4 * (numel_in + weight), F4 * numel_out)
