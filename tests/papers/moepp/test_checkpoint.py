"""A tiny random checkpoint in the layout of the released 7B model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from papers.moepp.checkpoint import load_released
from shared.errors import UserError

D, H, LAYERS, FFN, VOCABULARY = 16, 24, 2, 4, 40
CONFIG: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "vocab_size": VOCABULARY,
    "num_experts": [FFN + 4], "moe_use_mixtral_gating": False, "moe_2layer_gate": True, "moe_feature_no_mul_topk": False,
}  # fmt: skip


def weights(two_layer: bool = True) -> dict[str, Tensor]:
    """Names and shapes as the released code makes them, random values."""
    torch.manual_seed(0)
    n = FFN + 4
    found = {"model.embed_tokens.weight": (VOCABULARY, D), "model.norm.weight": (D,), "lm_head.weight": (VOCABULARY, D)}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}"
        found |= {f"{p}.self_attn.{part}_proj.weight": (D, D) for part in "qkvo"}
        found |= {f"{p}.input_layernorm.weight": (D,), f"{p}.post_attention_layernorm.weight": (D,)}
        gate, experts = f"{p}.mlp.moe.gate", f"{p}.mlp.moe.experts.experts"
        found |= {f"{gate}.gate_map.weight": (n, n)}
        found |= (
            {f"{gate}.wg.0.weight": (8 * n, D), f"{gate}.wg.2.weight": (n, 8 * n)}
            if two_layer
            else {f"{gate}.wg.weight": (n, D)}
        )
        for j in range(FFN):
            found |= {f"{experts}.{j}.up_proj.weight": (2 * H, D), f"{experts}.{j}.down_proj.weight": (D, H)}
        for j in (FFN, FFN + 1):
            found |= {f"{experts}.{j}.constant": (D,), f"{experts}.{j}.wg.weight": (2, D)}
    return {name: torch.randn(shape) * 0.3 for name, shape in found.items()}


def write(folder: Path, state: dict[str, Tensor], **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: state[name] for name in names[1::2]}, folder / "model-00002-of-00002.safetensors")
    return folder


def released_layer(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The first layer by the released rules, token by token: zero's gate to 0, gates renormalised, input doubled for the experts."""
    gate, experts = "model.layers.0.mlp.moe.gate", "model.layers.0.mlp.moe.experts.experts"
    y = torch.zeros_like(x)
    for t, token in enumerate(x):
        logits = state[f"{gate}.wg.2.weight"] @ torch.tanh(state[f"{gate}.wg.0.weight"] @ token)
        p, ids = torch.softmax(logits, 0).topk(2)
        p[ids == FFN + 3] = 0.0
        p, token = p / p.sum(), 2 * token
        for g, j in zip(p, ids.tolist(), strict=True):
            if j < FFN:
                a, b = (state[f"{experts}.{j}.up_proj.weight"] @ token).chunk(2)
                y[t] += g * (state[f"{experts}.{j}.down_proj.weight"] @ (torch.nn.functional.silu(a) * b))
            elif j < FFN + 2:
                mix = torch.softmax(state[f"{experts}.{j}.wg.weight"] @ token, 0)
                y[t] += g * (mix[0] * token + mix[1] * state[f"{experts}.{j}.constant"])
            elif j == FFN + 2:
                y[t] += g * token
    return y


def test_released_layout(tmp_path: Path) -> None:
    state = weights()
    model = load_released(write(tmp_path, state), dtype=torch.float32)
    assert model.options.experts.kinds == ("ffn",) * FFN + ("constant", "constant", "copy", "zero")
    x = torch.randn(64, D)
    with torch.no_grad():
        out = model.blocks[0].moe(x)
        torch.testing.assert_close(out.y, released_layer(state, x), atol=1e-5, rtol=1e-4)
        second = model.blocks[1].moe(x, out.logits).logits
        plain = model.blocks[1].moe(x).logits
        residual = out.logits @ state["model.layers.1.mlp.moe.gate.gate_map.weight"].t()
        torch.testing.assert_close(second, plain + residual, atol=1e-5, rtol=1e-4)
        logits = model(torch.randint(VOCABULARY, (2, 9))).logits
    assert logits.shape == (2, 9, VOCABULARY)
    assert bool(logits.isfinite().all())


def test_without_doubling(tmp_path: Path) -> None:
    model = load_released(write(tmp_path, weights(), moe_feature_no_mul_topk=True), dtype=torch.float32)
    assert model.blocks[0].moe.input_scale == 1.0


def test_mixtral_gates_and_one_layer_router_from_bin(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**CONFIG, "moe_use_mixtral_gating": True, "moe_2layer_gate": False})
    )
    torch.save(weights(two_layer=False), tmp_path / "pytorch_model.bin")
    model = load_released(tmp_path)
    assert model.blocks[0].moe.gating == "mixtral"
    assert model.blocks[0].moe.w_in.dtype == torch.bfloat16
    assert model.blocks[0].moe.router.weight.dtype == torch.float32


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_released(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="safetensors"):
        load_released(tmp_path)
    state = weights()
    del state["model.layers.1.mlp.moe.experts.experts.4.constant"]
    with pytest.raises(UserError, match=r"experts\.4\.constant"):
        load_released(write(tmp_path, state))
    with pytest.raises(UserError, match="moe_use_logits_norm"):
        load_released(write(tmp_path, weights(), moe_use_logits_norm=True))
    with pytest.raises(UserError, match="shape"):
        load_released(write(tmp_path, weights(), intermediate_size=H + 8))
