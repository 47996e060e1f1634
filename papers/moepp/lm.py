"""A small decoder whose every FFN is an MoE or MoE++ layer: the stand-in for the paper's language models.

Pre-norm blocks with RoPE and an untied head (Sec. 4.1); routing logits go from layer to layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from papers.moepp.layer import MoEPlusPlus
from papers.moepp.paths import Path
from papers.moepp.routing import Experts, Gating


@dataclass(frozen=True)
class Options:
    """Sizes and routing of the stand-in; all of it our choice except K, the gates and the kinds of experts."""

    experts: Experts
    layers: int = 3
    d_model: int = 64
    d_expert: int = 128
    heads: int = 4
    vocabulary: int = 256
    k: int = 2
    tau: float = 0.75
    pathway: bool = True
    gating: Gating = "paper"
    lb_scale: float | None = None
    capacity_factor: float | None = None
    path: Path = "auto"
    vector_std: float = 0.1
    embedding_std: float = 0.5
    two_layer_router: bool = False


class LMOutput(NamedTuple):
    """Logits of the next byte and what the layers' routers did."""

    logits: Tensor  # [B, S, vocabulary]
    balance_loss: Tensor  # mean over layers
    ids: Tensor  # [layers, B, S, K]
    routing: Tensor  # [layers, B, S, N] routing logits


class Attention(nn.Module):
    """Causal attention with rotary positions, without biases."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(x).view(b, s, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, s, d))


def rotary(length: int, width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, width/2] of rotary positions."""
    angle = torch.outer(torch.arange(length).float(), base ** (-torch.arange(0, width, 2).float() / width))
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [..., S, width]; the two halves of the width form the pairs."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    """Attention and a mixture of experts, each behind an RMSNorm."""

    def __init__(self, options: Options, first: bool) -> None:
        super().__init__()
        o, e = options, options.experts
        self.norm1, self.norm2 = nn.RMSNorm(o.d_model, eps=1e-6), nn.RMSNorm(o.d_model, eps=1e-6)
        self.attention = Attention(o.d_model, o.heads)
        self.moe = MoEPlusPlus(
            o.d_model, o.d_expert, e.ffn, n_constant=e.constant, n_copy=e.copy, n_zero=e.zero, k=o.k, tau=o.tau, gating=o.gating,
            pathway=o.pathway and not first, lb_scale=o.lb_scale, capacity_factor=o.capacity_factor, path=o.path,
            two_layer_router=o.two_layer_router,
        )  # fmt: skip

    def forward(self, x: Tensor, carried: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = x + self.attention(self.norm1(x), cos, sin)
        out = self.moe(self.norm2(x), carried)
        return x + out.y, out[1:]


class LanguageModel(nn.Module):
    """Decoder over bytes."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.options = options
        self.embedding = nn.Embedding(options.vocabulary, options.d_model)
        self.blocks = nn.ModuleList(Block(options, first=index == 0) for index in range(options.layers))
        self.norm = nn.RMSNorm(options.d_model, eps=1e-6)
        self.head = nn.Linear(options.d_model, options.vocabulary, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Variance 1/fan-in for matrices: with the usual 0.02 the O(1) outputs of copy and constant experts drown the FFNs' early on."""
        nn.init.normal_(self.embedding.weight, std=self.options.embedding_std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, MoEPlusPlus) and module.constants is not None:
                nn.init.normal_(module.constants.vector, std=self.options.vector_std)

    def forward(self, tokens: Tensor) -> LMOutput:
        """tokens: [B, S] (int64)."""
        cos, sin = rotary(tokens.shape[1], self.options.d_model // self.options.heads)
        cos, sin = cos.to(tokens.device), sin.to(tokens.device)
        x, carried, losses, ids, routing = self.embedding(tokens), None, [], [], []
        for block in self.blocks:
            x, (carried, loss, picked) = block(x, carried, cos, sin)
            losses.append(loss)
            ids.append(picked)
            routing.append(carried)
        return LMOutput(self.head(self.norm(x)), torch.stack(losses).mean(), torch.stack(ids), torch.stack(routing))


def loss(model: LanguageModel, inputs: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Training loss: cross-entropy in nats plus beta · balance loss."""
    out = model(inputs)
    return F.cross_entropy(out.logits.flatten(0, 1), targets.flatten()) + beta * out.balance_loss
