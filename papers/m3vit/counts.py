"""Closed-form MAC, parameter and routing counts of the M³ViT encoder and decoder (Sec. 3.1, 4.1; Supp. A.1).

The paper's "FLOPS (G)" column is GMAC of ONE task: the whole encoder, attention products included, plus ONE decoder.
All counts here are integers and 1 MAC is one multiply-add (2 FLOPs). Normalisation, GELU, softmax, residual additions
and interpolation are not MACs and are left out, as in the paper. The fields of an encoder may also be integer arrays:
a whole design space is then counted in one call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from shared.errors import UserError, unknown

Count: TypeAlias = int | NDArray[np.signedinteger[Any]]

DECODER_CHANNELS = 256  # width of the PUP decoder, Supp. A.1


@dataclass(frozen=True)
class Encoder:
    """The shape of a ViT encoder whose blocks 1, 3, 5, … may hold a mixture of experts.

    ``num_moe_blocks`` of the ``depth`` blocks carry ``num_experts`` experts of hidden size ``expert_hidden``, of which
    a token visits ``top_k``; the others carry a dense MLP of hidden size ``mlp_hidden``. ``num_moe_blocks=0`` is the
    dense ViT (M-ViT).
    """

    dim: Count = 384
    depth: int = 12
    mlp_hidden: Count = 1536
    num_moe_blocks: int = 6
    num_experts: Count = 16
    top_k: Count = 4
    expert_hidden: Count = 384
    patch_size: int = 16
    in_channels: int = 3

    def __post_init__(self) -> None:
        if not 0 <= 2 * self.num_moe_blocks <= self.depth:
            raise UserError(
                f"num_moe_blocks={self.num_moe_blocks} does not fit: at most every second block holds experts, "
                f"so choose 0 to {self.depth // 2}"
            )
        if np.any(np.asarray(self.top_k) < 1) or np.any(np.asarray(self.top_k) > np.asarray(self.num_experts)):
            raise UserError(f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}")

    def dense(self) -> Encoder:
        """The same encoder with a dense MLP in every block."""
        return replace(self, num_moe_blocks=0)

    @property
    def patch_values(self) -> int:
        """Input values of one patch (768 for 16 x 16 RGB)."""
        return self.in_channels * self.patch_size**2


ENCODERS: Mapping[str, Encoder] = {
    "tiny": Encoder(dim=192, mlp_hidden=768, expert_hidden=192),
    "small": Encoder(),
    "base": Encoder(dim=768, mlp_hidden=3072, expert_hidden=768),
}


@dataclass(frozen=True)
class Dataset:
    """Input size, output channels of each task (Sec. 4.1, Supp. A.1), backbone of the ResNet baselines (Tab. 1, 2)."""

    name: str
    height: int
    width: int
    task_channels: Mapping[str, int]
    resnet_depth: int

    def tokens(self, patch_size: int = 16) -> int:
        """Sequence length: the patches and one class token."""
        return self.patches(patch_size) + 1

    def patches(self, patch_size: int = 16) -> int:
        """Number of patches of one image."""
        if self.height % patch_size or self.width % patch_size:
            raise UserError(
                f"patch_size={patch_size} must divide {self.height} x {self.width}, the image size of {self.name}"
            )
        return self.height * self.width // patch_size**2


DATASETS: Mapping[str, Dataset] = {
    "pascal": Dataset(
        "PASCAL-Context", 512, 512, {"semseg": 21, "human_parts": 7, "sal": 1, "normals": 3, "edge": 1}, resnet_depth=18
    ),
    "nyud": Dataset("NYUD-v2", 480, 640, {"semseg": 40, "depth": 1}, resnet_depth=50),
}


def dataset(name: str) -> Dataset:
    """The data set called ``name``; raises UserError with the names allowed."""
    if name not in DATASETS:
        raise unknown("dataset", name, DATASETS)
    return DATASETS[name]


# --- MACs of the encoder ---


def patch_embedding_macs(encoder: Encoder, tokens: Count) -> Count:
    """Patch embedding: every token but the class token."""
    return (tokens - 1) * encoder.patch_values * encoder.dim


def projection_macs(encoder: Encoder, tokens: Count) -> Count:
    """Query, key, value and output projections of one block."""
    return 4 * tokens * encoder.dim**2


def attention_product_macs(encoder: Encoder, tokens: Count) -> Count:
    """Q·Kᵀ and A·V of one block: what counters that hook modules do not see."""
    return 2 * tokens**2 * encoder.dim


def mlp_macs(encoder: Encoder, tokens: Count) -> Count:
    """Dense MLP of one block."""
    return 2 * tokens * encoder.dim * encoder.mlp_hidden


def router_macs(encoder: Encoder, tokens: Count) -> Count:
    """Router of one MoE block and one task (Eq. 3)."""
    return tokens * encoder.dim * encoder.num_experts


def expert_macs(encoder: Encoder, tokens: Count) -> Count:
    """The ``top_k`` experts of every token of one MoE block (Eq. 2)."""
    return encoder.top_k * tokens * 2 * encoder.dim * encoder.expert_hidden


def encoder_macs(encoder: Encoder, tokens: Count) -> dict[str, Count]:
    """MACs of one encoder pass for one task, by component."""
    moe, plain = encoder.num_moe_blocks, encoder.depth - encoder.num_moe_blocks
    return {
        "patch_embedding": patch_embedding_macs(encoder, tokens),
        "projections": encoder.depth * projection_macs(encoder, tokens),
        "attention_products": encoder.depth * attention_product_macs(encoder, tokens),
        "mlp": plain * mlp_macs(encoder, tokens),
        "experts": moe * expert_macs(encoder, tokens),
        "router": moe * router_macs(encoder, tokens),
    }


def shared_prefix_macs(encoder: Encoder, tokens: Count) -> Count:
    """What no task changes: patch embedding, block 0 and the attention of block 1 (the first with a router)."""
    return (
        patch_embedding_macs(encoder, tokens)
        + 2 * projection_macs(encoder, tokens)
        + 2 * attention_product_macs(encoder, tokens)
        + mlp_macs(encoder, tokens)
    )


# --- MACs of the decoder, totals ---


def decoder_macs(dim: Count, patches: Count, out_channels: Count) -> Count:
    """PUP decoder of one task (Supp. A.1): 3x3 convolutions at 1/16, 1/8, 1/4, 1/2 of the image side, 1x1 at 1/2."""
    c = DECODER_CHANNELS
    return 9 * patches * dim * c + 9 * (4 + 16 + 64) * patches * c**2 + 64 * patches * c * out_channels


def mean_decoder_macs(encoder: Encoder, data: Dataset) -> float:
    """Mean over the tasks of a data set: the paper prints one number for all tasks."""
    patches = data.patches(encoder.patch_size)
    return float(np.mean([decoder_macs(encoder.dim, patches, channels) for channels in data.task_channels.values()]))


def single_task_macs(encoder: Encoder, data: Dataset) -> float:
    """Encoder plus one decoder, mean over the tasks: the paper's "FLOPS (G)" column (Tab. 1, 2)."""
    return float(sum_counts(encoder_macs(encoder, data.tokens(encoder.patch_size)))) + mean_decoder_macs(encoder, data)


def all_tasks_macs(encoder: Encoder, data: Dataset, share_prefix: bool = False) -> int:
    """All tasks of one image, each with its decoder.

    With experts every task needs an encoder pass of its own, because its router sees other features from block 1 on;
    ``share_prefix`` computes the task-independent prefix once. A dense encoder is shared by all tasks.
    """
    tokens, patches, tasks = data.tokens(encoder.patch_size), data.patches(encoder.patch_size), len(data.task_channels)
    one_pass = int(sum_counts(encoder_macs(encoder, tokens)))
    decoders = sum(int(decoder_macs(encoder.dim, patches, channels)) for channels in data.task_channels.values())
    if encoder.num_moe_blocks == 0:
        return one_pass + decoders
    repeated = int(shared_prefix_macs(encoder, tokens)) * (tasks - 1) if share_prefix else 0
    return tasks * one_pass - repeated + decoders


def sum_counts(parts: Mapping[str, Count]) -> Count:
    """Sum of the components of a count."""
    total: Count = 0
    for value in parts.values():
        total = total + value
    return total


# --- parameters ---


def expert_parameters(encoder: Encoder) -> Count:
    """One expert: two weight matrices and two biases."""
    return 2 * encoder.dim * encoder.expert_hidden + encoder.expert_hidden + encoder.dim


def mlp_parameters(encoder: Encoder) -> Count:
    """One dense MLP: two weight matrices and two biases."""
    return 2 * encoder.dim * encoder.mlp_hidden + encoder.mlp_hidden + encoder.dim


def attention_parameters(encoder: Encoder) -> Count:
    """Four projections with biases."""
    return 4 * encoder.dim**2 + 4 * encoder.dim


def patch_embedding_parameters(encoder: Encoder) -> Count:
    """Weights and bias of the patch embedding."""
    return encoder.patch_values * encoder.dim + encoder.dim


def encoder_parameters(encoder: Encoder, tokens: Count, routers: int = 1) -> Count:
    """Backbone without final norm and head; ``routers`` per MoE block (one per task in the multi-gate model)."""
    moe, plain = encoder.num_moe_blocks, encoder.depth - encoder.num_moe_blocks
    per_block = attention_parameters(encoder) + 4 * encoder.dim  # two LayerNorms
    experts = encoder.num_experts * expert_parameters(encoder) + routers * encoder.dim * encoder.num_experts
    embedding = patch_embedding_parameters(encoder) + encoder.dim + tokens * encoder.dim  # class token, positions
    return embedding + encoder.depth * per_block + plain * mlp_parameters(encoder) + moe * experts


def decoder_parameters(dim: Count, out_channels: Count) -> Count:
    """LayerNorm, four convolutions with bias and BatchNorm, and the 1x1 output convolution of one task."""
    c = DECODER_CHANNELS
    first, further = 9 * dim * c + 3 * c, 3 * (9 * c**2 + 3 * c)
    return 2 * dim + first + further + (c + 1) * out_channels
