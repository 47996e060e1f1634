"""Whole models: published sizes by closed form, cross-checks with fvcore and torch's counter, timm families, large language models."""

from __future__ import annotations

import logging
import time
from functools import cache
from statistics import median
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shared.workload import Workload, meta_model, trace

T, D, DEPTH = 197, 384, 12  # DeiT-S/16 at 224: 14 x 14 patches and a class token
ATTENTION = DEPTH * 2 * T * T * D
DEIT_S = 196 * 768 * D + DEPTH * 12 * T * D * D + ATTENTION + D * 1000


def image_model(name: str, **options: Any) -> tuple[nn.Module, torch.Tensor]:
    model = meta_model(timm.create_model, name, **options)
    return model, torch.empty(1, *model.default_cfg["input_size"], device="meta")


def fvcore_macs(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """MACs by operator; fvcore calls a MAC a flop."""
    logging.disable(logging.WARNING)
    analysis = FlopCountAnalysis(model.eval(), x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = dict(analysis.by_operator())
    logging.disable(logging.NOTSET)
    return counts


def test_deit_small_has_its_published_size() -> None:
    model, x = image_model("deit_small_patch16_224")
    work = trace(model, x)
    assert work.num_parameters == 22_050_664
    assert work.parameter_bytes == 4 * 22_050_664
    assert work.macs == DEIT_S == 4_598_882_304
    assert round(work.macs / 1e9, 1) == 4.6
    assert work.by_kind()["attention"].macs == ATTENTION


def test_deit_small_less_attention_is_what_fvcore_counts() -> None:
    model, x = image_model("deit_small_patch16_224")
    counted = fvcore_macs(timm.create_model("deit_small_patch16_224"), torch.zeros(x.shape))
    products = counted["conv"] + counted["linear"]
    assert trace(model, x).macs - ATTENTION == products
    assert round(sum(counted.values()) / 1e9, 2) == 4.25  # it adds the norms and lacks the attention products


def test_deit_small_agrees_with_the_counter_of_torch() -> None:
    model, x = image_model("deit_small_patch16_224")
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    assert trace(model, x).flops == counter.get_total_flops()


def test_deit_small_training_step_agrees_with_the_counter_of_torch() -> None:
    """torch runs attention unfused on meta: its backward pass has four products where a fused kernel has five."""
    model, x = image_model("deit_small_patch16_224")

    def step() -> None:
        model(x).sum().backward()

    with FlopCounterMode(display=False) as counter:
        step()
    assert trace(step, training=True).macs - ATTENTION // 2 == counter.get_total_flops() // 2


def test_deit_small_block_by_block() -> None:
    model, x = image_model("deit_small_patch16_224")
    modules = trace(model, x).by_module(2)
    assert {modules[f"blocks.{i}"].macs for i in range(DEPTH)} == {12 * T * D * D + 2 * T * T * D}
    assert modules["patch_embed.proj"].macs == 196 * 768 * D
    attention = trace(model, x).within("blocks.3.attn")
    assert attention.macs == 4 * T * D * D + 2 * T * T * D
    assert attention.num_parameters == 4 * D * D + 4 * D


def test_without_fused_attention_the_scores_go_through_memory() -> None:
    model, x = image_model("deit_small_patch16_224")
    fused = trace(model, x)
    for block in model.blocks:
        block.attn.fused_attn = False
    unfused = trace(model, x)
    assert unfused.macs == fused.macs
    scores = 4 * DEPTH * 6 * T * T
    assert (
        unfused.bytes - fused.bytes >= 4 * scores
    )  # written and read by the product, by the softmax, and by the next product


def test_cpu_and_meta_give_the_same_table() -> None:
    for name in ("test_vit", "test_resnet", "test_mambaout"):
        torch.manual_seed(0)
        real, meta = timm.create_model(name), meta_model(timm.create_model, name)
        x = torch.randn(1, *real.default_cfg["input_size"])
        for training in (False, True):
            a, b = trace(real, x, training=training), trace(meta, x.to("meta"), training=training)
            assert a.ops == b.ops, name
            assert a.saved == b.saved, name
            assert a.parameters == b.parameters, name
            assert a.buffers == b.buffers, name


@pytest.mark.parametrize(
    ("name", "macs", "parameters"), [("resnet50", 4_089_184_256, 25_557_032), ("mobilenetv2_100", 300_774_272, 3_504_872)]
)  # fmt: skip
def test_convolutional_networks_agree_with_fvcore(name: str, macs: int, parameters: int) -> None:
    """Published: 4.09 GMAC and 25.6 M, 300 MMAC and 3.5 M. fvcore gives both integers below."""
    model, x = image_model(name)
    work = trace(model, x)
    counted = fvcore_macs(timm.create_model(name), torch.zeros(x.shape))
    assert work.macs == counted["conv"] + counted["linear"] == macs
    assert work.num_parameters == parameters


def test_resnet50_in_closed_form() -> None:
    """Stem, bottlenecks 1x1, 3x3 (which carries the stride), 1x1 and shortcut of each stage, classifier."""
    macs, wide = 112 * 112 * 64 * 3 * 49 + 2048 * 1000, 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        side, narrow = 56 >> stage, 64 << stage
        for block in range(blocks):
            before = side if block or stage == 0 else 2 * side  # the first 1x1 of a stage still sees the larger map
            macs += before**2 * wide * narrow + side**2 * (9 * narrow**2 + narrow * 4 * narrow)
            if block == 0:
                macs += side**2 * wide * 4 * narrow
            wide = 4 * narrow
    model, x = image_model("resnet50")
    assert trace(model, x).macs == macs


FAMILIES = [
    "deit_tiny_patch16_224", "deit_small_distilled_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2",
    "vit_base_patch32_clip_224", "vit_medium_patch16_reg4_gap_256", "vit_relpos_small_patch16_224", "eva02_tiny_patch14_224",
    "beit_base_patch16_224", "swin_tiny_patch4_window7_224", "levit_128s", "mixer_s32_224", "mobilenetv2_050",
    "mobilenetv3_small_100", "mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_b0", "tf_efficientnet_lite0",
    "mnasnet_100", "fbnetc_100", "ghostnet_100", "regnety_002", "resnet18", "resnet50d", "resnetv2_50", "convnext_atto",
    "densenet121", "vgg11",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_families_trace_in_all_modes(name: str) -> None:
    model, x = image_model(name)
    x = x.expand(2, -1, -1, -1)
    inference = trace(model, x)

    def step() -> None:
        out = model.train()(x)
        sum(part.sum() for part in (out if isinstance(out, tuple) else (out,))).backward()

    training = trace(step, training=True)
    assert inference.num_parameters == training.num_parameters == sum(p.numel() for p in model.parameters())
    assert training.by_phase()["forward"].macs == inference.macs  # no network here drops work in eval mode
    # at most two products back for each forward, five for two in attention; the first layer has no gradient of its input
    attention = inference.by_kind().get("attention")
    most = 3 * inference.macs + (attention.macs // 2 if attention else 0)
    assert 2.8 * inference.macs < training.macs < most
    assert training.saved_bytes > 0
    assert all(op.module for op in inference.ops if op.kind in ("matmul", "conv", "attention"))


@cache
def tiny(name: str, batch: int, training: bool = False) -> Workload:
    model = meta_model(timm.create_model, name)
    return trace(model, torch.empty(batch, *model.default_cfg["input_size"], device="meta"), training=training)


@given(batch=st.integers(1, 40), name=st.sampled_from(["test_vit", "test_resnet", "test_efficientnet"]))
@settings(max_examples=10, deadline=None)
def test_work_is_linear_in_the_batch(batch: int, name: str) -> None:
    one, two, many = tiny(name, 1), tiny(name, 2), tiny(name, batch)
    assert many.macs == batch * one.macs
    assert many.vector_ops == batch * one.vector_ops
    per_image = two.bytes - one.bytes  # the rest are weights, read once
    assert many.bytes == one.bytes + (batch - 1) * per_image
    assert one.bytes - per_image >= 0.9 * one.parameter_bytes
    saved = [tiny(name, b, training=True).saved_bytes for b in (1, 2, batch)]
    assert saved[2] == saved[0] + (batch - 1) * (saved[1] - saved[0])


class Llama(nn.Module):
    """A decoder stack of the 7B shape: 32 blocks of width 4096 with 32 heads and a gated MLP of width 11008."""

    def __init__(
        self, depth: int = 32, d: int = 4096, hidden: int = 11008, vocabulary: int = 32000, heads: int = 32
    ) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, d)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {name: nn.Linear(a, b, bias=False) for name, a, b in (
                    ("qkv", d, 3 * d), ("out", d, d), ("gate", d, hidden), ("up", d, hidden), ("down", hidden, d)
                )} | {"norm1": nn.RMSNorm(d), "norm2": nn.RMSNorm(d)}
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        b, t, d = x.shape
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm1"](x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["out"](attended.transpose(1, 2).reshape(b, t, d))
            y = layer["norm2"](x)
            x = x + layer["down"](F.silu(layer["gate"](y)) * layer["up"](y))
        return self.head(self.norm(x))


def test_a_7b_model_is_traced_on_meta_in_seconds() -> None:
    model = meta_model(Llama)
    tokens = torch.empty(1, 2048, dtype=torch.int64, device="meta")
    start = time.perf_counter()
    work = trace(model, tokens)
    assert time.perf_counter() - start < 5
    d, hidden, vocabulary, n = 4096, 11008, 32000, 2048
    block = 4 * d * d + 3 * d * hidden
    assert work.num_parameters == 32 * (block + 2 * d) + 2 * vocabulary * d + d == 6_738_415_616
    assert work.macs == n * (32 * block + vocabulary * d) + 32 * 2 * n * n * d
    assert work.by_kind()["gather"].bytes_read == 8 * n + 4 * n * d
    assert len(work.compressed().ops) < 30


def test_a_7b_training_step_is_traced_on_meta_in_seconds() -> None:
    model = meta_model(Llama)
    tokens = torch.empty(1, 2048, dtype=torch.int64, device="meta")
    start = time.perf_counter()
    work = trace(model, tokens, training=True)
    assert time.perf_counter() - start < 5
    assert work.saved_bytes > 32 * 4 * 2048 * (3 * 4096 + 3 * 11008)


def test_deit_small_is_traced_in_well_under_a_second() -> None:
    model, x = image_model("deit_small_patch16_224")
    trace(model, x)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        trace(model, x)
        seconds.append(time.perf_counter() - start)
    assert median(seconds) < 3  # about 0.1 s on an idle core; the slack is for a loaded machine


def test_a_method_of_a_model_lists_the_parameters_that_it_uses() -> None:
    model, x = image_model("deit_small_patch16_224")
    work: Workload = trace(model.forward_features, x)
    assert work.macs == DEIT_S - 1000 * D
    assert work.num_parameters == 22_050_664 - 1000 * D - 1000
    assert set(work.by_module(1)) == {"patch_embed", "", "blocks", "norm"}
