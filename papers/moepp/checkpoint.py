"""The authors' released checkpoint (MoE++ 7B/(16+4)E) as a :class:`papers.moepp.lm.LanguageModel`.

The layout is that of their Hugging Face code: a folder with ``config.json`` and weights in ``*.safetensors`` or ``pytorch_model*.bin``.
Which gating the released configuration sets is unknown to us; whatever it says is followed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from papers.moepp.lm import LanguageModel, Options
from papers.moepp.routing import Experts
from shared.errors import UserError

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_experts",
)  # fmt: skip
_ONLY: dict[str, Any] = {
    "moe_use_logits_norm": False,
    "rope_scaling": None,
    "moe_expert_interval": 1,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
}
CONSTANTS = 2  # fixed in the authors' code, as are one copy and one zero expert


def load_released(folder: str | Path, *, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
    """The model in ``folder``, on the CPU, routers in fp32.

    Raises:
        UserError: a file or a weight is missing or has another shape, or the configuration asks for what is not supported.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} needs a config.json in the layout of the released MoE++ model ({error})") from error
    options = options_of(config)
    with torch.device("meta"):
        model = LanguageModel(options)
    state = dict(_translated(_weights(folder), options, dtype))
    expected = model.state_dict()
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise UserError(
                f"{folder}: {name} has shape {tuple(value.shape)}, config.json asks for {tuple(expected[name].shape)}"
            )
    model.load_state_dict(state, assign=True)
    for block in model.blocks:
        moe: Any = block.moe
        moe.eta = torch.tensor(moe.experts.eta(moe.tau))
        if config.get("moe_feature_no_mul_topk", False):
            moe.input_scale = 1.0
    return model.eval()


def options_of(config: Mapping[str, Any]) -> Options:
    """What ``config.json`` describes.

    Raises:
        UserError: a key is missing, or asks for what is not supported.
    """
    missing = [name for name in _SIZES if name not in config]
    if missing:
        raise UserError(f"config.json has no {missing[0]}, which the released MoE++ layout has")
    heads = config["num_attention_heads"]
    for name, only in {"num_key_value_heads": heads, **_ONLY}.items():
        value = config.get(name, only)
        if value != only and not (name == "num_key_value_heads" and value is None):
            raise UserError(f"config.json: {name}={value} is not supported, only {only}")
    total = config["num_experts"]
    total = total[0] if isinstance(total, list) else total
    return Options(
        Experts(total - CONSTANTS - 2, CONSTANTS, 1, 1),
        layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        d_expert=config["intermediate_size"],
        heads=heads,
        vocabulary=config["vocab_size"],
        gating="mixtral" if config.get("moe_use_mixtral_gating", False) else "repo",
        two_layer_router=config.get("moe_2layer_gate", True),
    )


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of all shards."""
    from safetensors.torch import load_file

    shards = sorted(folder.glob("*.safetensors"))
    loaded = [load_file(path) for path in shards]
    if not shards:
        shards = sorted(folder.glob("pytorch_model*.bin"))
        loaded = [torch.load(path, map_location="cpu", weights_only=True, mmap=True) for path in shards]
    if not shards:
        raise UserError(f"{folder} has neither *.safetensors nor pytorch_model*.bin")
    return {name: value for shard in loaded for name, value in shard.items()}


def _translated(weights: Mapping[str, Tensor], o: Options, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Our names and tensors from theirs; the first layer's unused residual is left out."""

    def take(name: str) -> Tensor:
        if name not in weights:
            raise UserError(f"the checkpoint has no weight {name}")
        return weights[name].to(dtype)

    yield "embedding.weight", take("model.embed_tokens.weight")
    yield "norm.weight", take("model.norm.weight")
    yield "head.weight", take("lm_head.weight")
    for layer in range(o.layers):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        yield f"{ours}.norm1.weight", take(f"{theirs}.input_layernorm.weight")
        yield f"{ours}.norm2.weight", take(f"{theirs}.post_attention_layernorm.weight")
        projections = [take(f"{theirs}.self_attn.{part}_proj.weight") for part in "qkv"]
        yield f"{ours}.attention.qkv.weight", torch.cat(projections)
        yield f"{ours}.attention.out.weight", take(f"{theirs}.self_attn.o_proj.weight")
        gate, experts = f"{theirs}.mlp.moe.gate", f"{theirs}.mlp.moe.experts.experts"
        if o.two_layer_router:
            yield f"{ours}.moe.router.hidden", take(f"{gate}.wg.0.weight").float()
        last = "wg.2" if o.two_layer_router else "wg"
        yield f"{ours}.moe.router.weight", take(f"{gate}.{last}.weight").float()
        if layer > 0:
            yield f"{ours}.moe.router.pathway", take(f"{gate}.gate_map.weight").float()
        ffn, constants = range(o.experts.ffn), range(o.experts.ffn, o.experts.ffn + o.experts.constant)
        yield f"{ours}.moe.w_in", torch.stack([take(f"{experts}.{j}.up_proj.weight") for j in ffn])
        yield f"{ours}.moe.w_out", torch.stack([take(f"{experts}.{j}.down_proj.weight") for j in ffn])
        yield f"{ours}.moe.constants.weight", torch.stack([take(f"{experts}.{j}.wg.weight") for j in constants])
        yield f"{ours}.moe.constants.vector", torch.stack([take(f"{experts}.{j}.constant") for j in constants])
