"""Attention is one fused operator on every device: its products, its traffic, what it saves, and its values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shared.workload import Workload, trace

FORWARD, BACKWARD = "aten.scaled_dot_product_attention", "aten.scaled_dot_product_attention_backward"
B, H, L, S, E, V = 2, 6, 10, 12, 16, 8


def qkv(device: str = "meta", kv_heads: int = H, grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((B, H, L, E), (B, kv_heads, S, E), (B, kv_heads, S, V))
    q, k, v = (torch.randn(shape, device=device, requires_grad=grad) for shape in shapes)
    return q, k, v


def names(work: Workload) -> list[str]:
    return [op.name for op in work.ops]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_forward_is_one_operator(device: str) -> None:
    (op,) = trace(F.scaled_dot_product_attention, *qkv(device)).ops
    scores = B * H * L * S
    assert (op.name, op.kind, op.dtype) == (FORWARD, "attention", "float32")
    assert op.flops == 2 * scores * (E + V)
    assert op.vector_ops == 6 * scores  # scale, and five of softmax
    assert op.bytes_read == 4 * B * H * (L * E + S * E + S * V)  # no trace of the L x S scores
    assert op.bytes_written == 4 * B * H * L * V


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_training_writes_and_saves_the_logsumexp(device: str) -> None:
    work = trace(F.scaled_dot_product_attention, *qkv(device, grad=True), training=True)
    assert work.totals.bytes_written == 4 * (B * H * L * V + B * H * L)
    operands = B * H * (L * E + S * E + S * V)
    assert work.saved_bytes == 4 * (operands + B * H * L * V + B * H * L)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_backward_is_one_operator_with_five_products(device: str) -> None:
    q, k, v = qkv(device, grad=True)
    work = trace(lambda: F.scaled_dot_product_attention(q, k, v).backward(torch.ones_like(q[..., :V])), training=True)
    (op,) = (op for op in work.ops if op.kind == "attention" and op.phase == "backward")
    assert op.name == BACKWARD
    scores, operands, out = B * H * L * S, B * H * (L * E + S * E + S * V), B * H * L * V
    assert op.flops == 2 * scores * (3 * E + 2 * V)  # q·kᵀ again, dv, dp, dq, dk
    assert op.bytes_read == 4 * (operands + 2 * out + B * H * L)  # and out, its gradient, the log-sum-exp
    assert op.bytes_written == 4 * operands


def test_equal_head_sizes_give_the_usual_ratios() -> None:
    """4·L·S·d forward and 2.5 times that backward, as the FlashAttention papers count."""
    q, k, v = (torch.empty(1, 1, 128, 64, device="meta", requires_grad=True) for _ in range(3))
    work = trace(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward(), training=True)
    phases = work.by_phase()
    assert phases["forward"].flops == 4 * 128 * 128 * 64
    assert 2 * phases["backward"].flops == 5 * phases["forward"].flops


def test_causal_is_counted_dense() -> None:
    q = torch.empty(B, H, L, E, device="meta")
    dense = trace(F.scaled_dot_product_attention, q, q, q)
    causal = trace(F.scaled_dot_product_attention, q, q, q, is_causal=True)
    assert causal.ops == dense.ops


def test_a_mask_is_read_and_saved_as_it_is() -> None:
    q, k, v = qkv(grad=True)
    plain = trace(F.scaled_dot_product_attention, q, k, v, training=True)
    for dtype, width in ((torch.bool, 1), (torch.float32, 4)):
        mask = torch.ones(B, 1, L, S, dtype=dtype, device="meta")
        masked = trace(F.scaled_dot_product_attention, q, k, v, attn_mask=mask, training=True)
        assert masked.totals.bytes_read - plain.totals.bytes_read == width * B * L * S
        assert masked.saved_bytes - plain.saved_bytes == width * B * L * S
        assert masked.flops == plain.flops
        assert masked.vector_ops - plain.vector_ops == B * H * L * S


def test_the_function_is_found_when_it_was_imported_by_name() -> None:
    original = F.scaled_dot_product_attention
    assert names(trace(lambda q, k, v: original(q, k, v), *qkv())) == [FORWARD]
    assert names(trace(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *qkv())) == [FORWARD]
    assert F.scaled_dot_product_attention is original


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_grouped_queries_share_keys_and_values(device: str) -> None:
    q, k, v = qkv(device, kv_heads=2)
    (op,) = trace(F.scaled_dot_product_attention, q, k, v, enable_gqa=True).ops
    assert op.flops == 2 * B * H * L * S * (E + V)  # six query heads
    assert op.bytes_read == 4 * B * (H * L * E + 2 * S * E + 2 * S * V)  # two key and value heads


@given(b=st.integers(1, 3), h=st.integers(1, 4), n=st.integers(1, 20), s=st.integers(1, 20), d=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_flops_agree_with_the_unfused_products_that_torch_counts(b: int, h: int, n: int, s: int, d: int) -> None:
    q, k = torch.randn(b, h, n, d), torch.randn(b, h, s, d)
    with FlopCounterMode(display=False) as counter:
        ((q @ k.transpose(-1, -2)).softmax(-1)) @ k
    assert trace(F.scaled_dot_product_attention, q, k, k).flops == counter.get_total_flops()


def gradients(options: dict[str, Any], mask: torch.Tensor | None, traced: bool) -> list[torch.Tensor]:
    inputs = [*qkv("cpu", kv_heads=2 if options.get("enable_gqa") else H, grad=True)]
    if mask is not None:
        mask = mask.clone().requires_grad_(mask.is_floating_point())

    def step() -> None:
        torch.manual_seed(1)
        out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, **options)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()

    if traced:
        trace(step, training=True)
    else:
        step()
    found = [t.grad for t in (*inputs, mask) if t is not None and t.requires_grad]
    assert all(g is not None for g in found)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
def test_values_and_gradients_are_those_of_torch(options: dict[str, Any]) -> None:
    for ours, theirs in zip(gradients(options, None, True), gradients(options, None, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", [torch.rand(B, 1, L, S) > 0.2, torch.randn(1, H, L, S)])
def test_masks_give_the_gradients_of_torch(mask: torch.Tensor) -> None:
    ours, theirs = gradients({}, mask, True), gradients({}, mask, False)
    assert len(ours) == (4 if mask.is_floating_point() else 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_dropout_draws_the_same_mask_in_the_backward_pass() -> None:
    """With v = identity the output is the dropped attention matrix, and the gradient of v is its transpose times the output's."""
    n = 8
    torch.manual_seed(0)
    q = torch.randn(1, 1, n, n)
    v = torch.eye(n)[None, None].requires_grad_()
    kept: list[torch.Tensor] = []

    def step() -> None:
        out = F.scaled_dot_product_attention(q, q, v, dropout_p=0.5)
        kept.append(out.detach())
        torch.rand(3)  # whatever is drawn in between
        out.backward(torch.eye(n)[None, None])

    trace(step, training=True)
    assert v.grad is not None
    assert (kept[0] == 0).any()
    torch.testing.assert_close(v.grad, kept[0].transpose(-1, -2))


def test_merging_the_heads_after_a_fused_kernel_is_a_view() -> None:
    def attention(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.view(B, L, 3, H, E).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, H * E)

    for device in ("cpu", "meta"):
        assert names(trace(attention, torch.randn(B, L, 3 * H * E, device=device))) == [FORWARD]


def test_views_of_one_projection_are_saved_as_one_storage() -> None:
    x = torch.empty(B, L, 3 * H * E, device="meta", requires_grad=True)

    def attention(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.view(B, L, 3, H, E).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v)

    saved = trace(attention, x, training=True).saved
    assert sorted(held.size_bytes for held in saved) == sorted(
        4 * n for n in (B * L * 3 * H * E, B * H * L * E, B * H * L)
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention_is_fused(device: str, training: bool) -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=True, device=device)
    x = torch.randn(2, 10, 16, device=device)
    work = trace(layer, x, x, x, need_weights=False, training=training)
    assert names(work).count(FORWARD) == 1
    attention = 2 * 10 * 10 * 16 * 2
    assert work.macs == 4 * 20 * 16 * 16 + attention


def test_asking_for_the_weights_writes_them() -> None:
    """torch itself then runs separate products and a softmax over the N x N scores."""
    layer = nn.MultiheadAttention(16, 4, batch_first=True, device="meta")
    x = torch.empty(2, 10, 16, device="meta")
    fused, weights = trace(layer, x, x, x, need_weights=False), trace(layer, x, x, x)
    assert FORWARD not in names(weights)
    assert weights.macs == fused.macs
    assert weights.bytes > fused.bytes + 4 * 4 * (2 * 4 * 10 * 10)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder_layers_do_not_take_the_fused_layer_path(device: str, training: bool) -> None:
    d, tokens, hidden = 16, 10, 32
    layer = nn.TransformerEncoderLayer(d, 4, hidden, batch_first=True, device=device)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    work = trace(encoder, torch.randn(2, tokens, d, device=device), training=training)
    assert work.macs == 2 * 2 * (4 * tokens * d * d + 2 * tokens * tokens * d + 2 * tokens * d * hidden)
    assert names(work).count(FORWARD) == 2
    assert {op.module for op in work.ops if op.kind == "attention"} == {"layers.0.self_attn", "layers.1.self_attn"}


def test_autocast_casts_before_the_kernel() -> None:
    q, k, v = qkv("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        work = trace(F.scaled_dot_product_attention, q, k, v)
        assert names(work) == ["aten._to_copy"] * 3 + [FORWARD]
        again = trace(F.scaled_dot_product_attention, *(t.bfloat16() for t in (q, k, v)))
    assert work.ops[-1] == again.ops[0]
    assert again.ops[0].dtype == "bfloat16"


def test_a_kernel_called_by_name_costs_the_same() -> None:
    q, k, _ = qkv("cpu")
    work = trace(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, q, k, k)
    assert work.flops == trace(F.scaled_dot_product_attention, q, k, k).flops
    assert [op.kind for op in work.ops] == ["attention"]
