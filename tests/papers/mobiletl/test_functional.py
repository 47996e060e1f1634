"""The step-derivative activations and shift-only norms: closed forms, bits, layouts, and the Triton kernels through the interpreter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from papers.mobiletl.functional import (
    coded_hard_swish,
    derivative_levels,
    hard_sigmoid,
    pack_bits,
    packed_act,
    shift_act,
    shift_norm,
    unpack_bits,
)
from shared.errors import UserError


def _identity_norm(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zeros, ones = torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)
    return ones, zeros.clone().requires_grad_(), zeros, ones


def _norm(channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    draw = lambda: torch.rand(channels, generator=g, dtype=torch.float64)  # noqa: E731
    weight, bias, mean, var = draw() + 0.5, draw() - 0.5, draw() - 0.5, draw() + 0.5
    return weight.to(dtype), bias.to(dtype).requires_grad_(), mean.to(dtype), var.to(dtype)


def test_hard_swish_at_five_points() -> None:
    """Value 0, -1/3, 0, 2/3, 4; exact derivative 0, 1/6, 1/2, 5/6, 1; the step's 0, 0, 1, 1, 1 (1 at exactly 0)."""
    x = torch.tensor([-4.0, -1.0, 0.0, 1.0, 4.0], dtype=torch.float64).view(1, 1, 1, 5).requires_grad_()
    y = shift_act(x, *_identity_norm(1), 0.0, "hard_swish")
    assert torch.allclose(y.flatten(), torch.tensor([0, -1 / 3, 0, 2 / 3, 4], dtype=torch.float64))
    (step,) = torch.autograd.grad(y.sum(), x)
    assert step.flatten().tolist() == [0, 0, 1, 1, 1]
    (exact,) = torch.autograd.grad(F.hardswish(x).sum(), x)
    assert torch.allclose(exact.flatten(), torch.tensor([0, 1 / 6, 1 / 2, 5 / 6, 1], dtype=torch.float64))


def test_relu6_passes_gradients_above_six() -> None:
    x = torch.tensor([-1.0, 0.0, 3.0, 7.0]).view(1, 1, 2, 2).requires_grad_()
    assert torch.autograd.grad(packed_act(x, "relu6", step=True).sum(), x)[0].flatten().tolist() == [0, 1, 1, 1]
    assert torch.autograd.grad(packed_act(x, "relu6", step=False).sum(), x)[0].flatten().tolist() == [0, 0, 1, 0]


def test_how_well_the_step_resembles_hard_swish_derivative() -> None:
    """u ~ N(0, 1): E[h'²] = 0.35853, E[h' m] = 0.38218, cosine 0.90265, mean squared difference 0.09417."""
    density = lambda u: math.exp(-u * u / 2) / math.sqrt(2 * math.pi)  # noqa: E731
    slope = lambda u: float(torch.autograd.functional.jacobian(F.hardswish, torch.tensor(u, dtype=torch.float64)))  # noqa: E731
    step = lambda u: float(u >= 0)  # noqa: E731

    def mean(function: Callable[[float], float]) -> float:
        return sum(quad(lambda u: function(u) * density(u), a, b)[0] for a, b in ((-9, -3), (-3, 0), (0, 3), (3, 9)))

    square, cross = mean(lambda u: slope(u) ** 2), mean(lambda u: slope(u) * step(u))
    assert square == pytest.approx(0.35853, abs=1e-5)
    assert cross == pytest.approx(0.38218, abs=1e-5)
    assert cross / math.sqrt(square / 2) == pytest.approx(0.90265, abs=1e-5)
    assert mean(lambda u: (slope(u) - step(u)) ** 2) == pytest.approx(0.09417, abs=1e-5)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hard_swish", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_closed_form(activation: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """dx = a m dy and dβ = Σ m dy, in every layout; dy arrives in the other layout than x."""
    torch.manual_seed(0)
    x = (3 * torch.randn(3, 5, 3, 7, dtype=dtype)).to(memory_format=layout).requires_grad_()
    weight, bias, mean, var = _norm(5, dtype)
    dy = torch.randn(3, 5, 3, 7, dtype=dtype)
    if layout is torch.contiguous_format:
        dy = dy.to(memory_format=torch.channels_last)
    y = shift_act(x, weight, bias, mean, var, 1e-3, activation)
    assert y.is_contiguous(memory_format=layout)
    dx, db = torch.autograd.grad(y, (x, bias), dy)
    a = (weight / torch.sqrt(var + 1e-3)).view(1, -1, 1, 1)
    m = ((x - mean.view(1, -1, 1, 1)) * a + bias.view(1, -1, 1, 1) >= 0).to(dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(dx, a * m * dy, **tolerance)
    assert torch.allclose(db, (m * dy).sum((0, 2, 3)), **tolerance)


def test_forward_is_the_frozen_base_bit_for_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 5)
    weight, bias, mean, var = _norm(6, torch.float32)
    base = F.hardswish(F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5))
    assert torch.equal(shift_act(x, weight, bias, mean, var, 1e-5, "hard_swish"), base)
    with torch.no_grad():
        assert torch.equal(shift_act(x, weight, bias, mean, var, 1e-5, "hard_swish"), base)


def test_relu_gradients_are_autograds() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    weight, bias, mean, var = _norm(3, torch.float64)
    dy = torch.randn_like(x)
    reference = F.relu(F.batch_norm(x, mean, var, weight, bias, training=False, eps=1e-5))
    expected = torch.autograd.grad(reference, (x, bias), dy)
    got = torch.autograd.grad(shift_act(x, weight, bias, mean, var, 1e-5, "relu"), (x, bias), dy)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_shift_norm_and_hard_sigmoid_pass_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, bias, mean, var = _norm(3, torch.float64)
    assert torch.autograd.gradcheck(lambda x, b: shift_norm(x, weight, b, mean, var, 1e-5), (x, bias))
    v = torch.tensor([-4.0, -2.9, 0.1, 2.9, 3.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hard_sigmoid, (v,))


@given(st.lists(st.booleans(), min_size=1, max_size=70))
@settings(deadline=None, max_examples=50)
def test_packing_is_undone(bits: list[bool]) -> None:
    mask = torch.tensor(bits)
    packed = pack_bits(mask)
    assert packed.numel() == -(-len(bits) // 8)
    assert packed[0].item() == sum(bit << i for i, bit in enumerate(bits[:8]))
    assert torch.equal(unpack_bits(packed, mask), mask)


def test_what_is_kept() -> None:
    """ceil(N / 8) bytes of bits and the vector a: nothing as large as the map."""
    x = torch.randn(2, 5, 3, 3, requires_grad=True)
    kept: list[int] = []
    weight, bias, mean, var = _norm(5, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        shift_act(x, weight, bias, mean, var, 1e-5, "hard_swish")
    assert sorted(kept) == [-(-90 // 8), 4 * 5]


def test_unknown_activation() -> None:
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    with pytest.raises(UserError, match="hard_swish"):
        shift_act(x, *_identity_norm(1), 0.0, "hardswish")
    with pytest.raises(UserError, match="relu6"):
        packed_act(x, "silu", step=False)


def test_bfloat16_on_cpu() -> None:
    x = torch.randn(2, 4, 3, 3).bfloat16().requires_grad_()
    weight, bias, mean, var = _norm(4, torch.float32)
    y = shift_act(x, weight, bias, mean, var, 1e-5, "relu6")
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


_TRITON = """
import torch
from papers.mobiletl import functional, kernels

torch.manual_seed(0)
kernels._ROWS_PER_PROGRAM = 64  # several programs for each channel, as on a large map
for shape in ((2, 40, 5, 7), (3, 5, 9, 7)):
    for layout in (torch.contiguous_format, torch.channels_last):
        for activation in functional.STEP_ACTIVATIONS if shape[1] == 5 else ('hard_swish',):
            channels = shape[1]
            x, grad = ((3 * torch.randn(shape)).to(memory_format=layout) for _ in range(2))
            constants = [torch.rand(channels) + 0.5 for _ in range(4)]
            last = layout == torch.channels_last
            gate = torch.rand(shape[:2]) * 1.4 - 0.2
            gate, mean_grad = gate.clamp(0, 1), torch.randn(shape[:2])
            y, kept = functional.step_forward(x, *constants, 1e-3, activation)
            z, packed = kernels.step_forward(x.clone(), *constants, 1e-3, activation, overwrite=True)
            assert torch.allclose(y, z, atol=1e-5) and torch.equal(kept[1], packed[0])
            for vectors in ({"gate": None, "mean_grad": None}, {"gate": gate, "mean_grad": mean_grad}):
                options = {"channels_last": last, "input_grad": True, "bias_grad": True, **vectors}
                ours = kernels.step_backward(grad.clone(), packed, 1e-3, overwrite=True, **options)
                for a, b in zip(ours, functional.step_backward(grad, kept, 1e-3, **options), strict=True):
                    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), (shape, activation)
            assert torch.allclose(kernels.gate_backward(grad, y, gate), functional.gate_backward(grad, y, gate), rtol=1e-4, atol=1e-4)
"""


def test_triton_kernels_agree_with_torch() -> None:
    """Runs the kernels in Triton's interpreter, on CPU tensors; without a GPU this is all that can be checked of them."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-c", _TRITON], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"}
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]


def test_derivative_levels_are_the_means_of_the_derivative() -> None:
    """(2 u + 3) / 6 is linear on [-3, 3], so its mean over an interval is its value in the middle; one bit is the step."""
    assert derivative_levels(1) == pytest.approx((0.0, 1.0))
    assert derivative_levels(2) == pytest.approx((-0.25, 0.25, 0.75, 1.25))
    middles = [-3 + (i + 0.5) * 6 / 16 for i in range(16)]
    assert derivative_levels(4) == pytest.approx([(2 * u + 3) / 6 for u in middles])
    with pytest.raises(UserError, match="number of bits"):
        derivative_levels(3)


@pytest.mark.parametrize(("bits", "kept_bytes"), [(1, 2), (2, 4), (4, 7)])
def test_coded_hard_swish_keeps_few_bits_and_backs_with_levels(bits: int, kept_bytes: int) -> None:
    u = torch.tensor([-9.0, -2.9, -1.6, -1.4, -0.1, 0.1, 1.4, 1.6, 2.9, 9.0, 0.5, -0.5, 2.0], requires_grad=True)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        y = coded_hard_swish(u, bits)
    assert sizes == [kept_bytes]  # 13 elements
    assert torch.equal(y, F.hardswish(u))
    y.sum().backward()
    width = 6 / 2**bits
    index = [min(max(int((v + 3) // width), 0), 2**bits - 1) for v in u.tolist()]
    assert u.grad is not None
    assert u.grad.tolist() == pytest.approx([derivative_levels(bits)[i] for i in index])


def test_coded_hard_swish_in_channels_last() -> None:
    x = torch.randn(2, 5, 3, 4)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        u = x.clone().to(memory_format=layout).requires_grad_()
        coded_hard_swish(u, 2).sum().backward()
        gradients.append(u.grad)
    assert torch.equal(*gradients)
