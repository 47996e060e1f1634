"""HMoHE: a hash-encoded gate sends each point to one of E hash grids with resolution ranges of their own (Switch-NeRF++).

The paper's code and hyper-parameters are not public. What is known: gate = softmax(MLP(hash(x))), top-1; an expert is a hash grid with its
own range and an MLP; the result is weighted by the gate. Widths, ranges, head, sampler and losses are our choice (nerfacto's where it
has them); :data:`CONFIG_A` is the full size, :data:`CONFIG_S` the one for a CPU.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.switchnerf.encodings import frequency_encoding, full_precision, spherical_harmonics, truncated_exp
from papers.switchnerf.hashgrid import Backend, GridSpec, HashEncoding
from papers.switchnerf.moe import ExpertMLP, balance_loss, capacity, dispatch
from papers.switchnerf.switch import FieldOutput, encoded_width
from shared.errors import UserError

GateKind: TypeAlias = Literal["hash", "mlp"]


@dataclass(frozen=True)
class HMoHEConfig:
    """A field of hash experts. One expert makes a plain hash-grid field: its gate value is 1."""

    experts: tuple[GridSpec, ...]
    expert_hidden: int
    gate: GridSpec
    gate_hidden: int
    gate_kind: GateKind = "hash"  # mlp: a frequency-encoded MLP gate, for comparison
    outputs: int = 16  # of an expert: raw density and features
    head: tuple[int, ...] = (64, 64)
    head_sees_density: bool = False
    direction_frequencies: int | None = None  # None: spherical harmonics of degree 4
    density: Literal["exp", "softplus"] = "exp"
    appearance: int = 0
    images: int = 1
    capacity_factor: float | None = 1.0  # None: no limit in training either
    prioritised: bool = True


def heterogeneous(ranges: tuple[tuple[int, int], ...], levels: int, log2_size: int) -> tuple[GridSpec, ...]:
    """One grid per (n_min, n_max)."""
    return tuple(GridSpec(levels, low, high, log2_size) for low, high in ranges)


CONFIG_A = HMoHEConfig(
    experts=heterogeneous(tuple((16, 2**p) for p in (11, 11, 12, 12, 13, 13, 14, 14)), 16, 19),
    expert_hidden=64, gate=GridSpec(8, 16, 512, 17), gate_hidden=64, appearance=48,
)  # fmt: skip
CONFIG_S = HMoHEConfig(
    experts=heterogeneous(((8, 64), (12, 128), (16, 256), (32, 512)), 4, 12),
    expert_hidden=32, gate=GridSpec(4, 4, 32, 12), gate_hidden=16, head=(32,), head_sees_density=True,
    direction_frequencies=2, density="softplus",
)  # fmt: skip
PROPOSALS = (GridSpec(5, 16, 128, 17), GridSpec(5, 16, 256, 17))  # nerfacto's two proposal grids


def bias_free_mlp(widths: list[int]) -> nn.Sequential:
    """Linear layers without bias (as fused hash-grid MLPs have them), ReLU between."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class HashGate(nn.Module):
    """softmax(MLP(hash(x))) in float32."""

    def __init__(self, grid: GridSpec, hidden: int, experts: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.encoding = HashEncoding([grid], backend)
        self.mlp = bias_free_mlp([self.encoding.width, hidden, experts])

    def forward(self, x: Tensor) -> Tensor:
        """(S, 3) in [0, 1] -> probabilities (S, E)."""
        with full_precision(x):
            return torch.softmax(self.mlp(self.encoding(x)), dim=-1)


class FrequencyGate(nn.Module):
    """A gate like Switch-NeRF's on 4 frequencies, 64 wide."""

    def __init__(self, experts: int, width: int = 64, frequencies: int = 4) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.net = nn.Sequential(
            nn.Linear(encoded_width(3, frequencies), width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.Linear(width, experts, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(S, 3) in [0, 1] -> probabilities (S, E)."""
        with full_precision(x):
            return torch.softmax(self.net(frequency_encoding(2.0 * x - 1.0, self.frequencies)), dim=-1)


class HMoHE(nn.Module):
    """Gate, heterogeneous hash experts and head; one field for foreground and (by contraction) background."""

    def __init__(self, config: HMoHEConfig, backend: Backend = "auto") -> None:
        super().__init__()
        self.config = config
        count = len(config.experts)
        if count == 0:
            raise UserError("HMoHE needs at least one expert grid")
        self.gate: HashGate | FrequencyGate | None = None
        if count > 1 and config.gate_kind == "hash":
            self.gate = HashGate(config.gate, config.gate_hidden, count, backend)
        elif count > 1:
            self.gate = FrequencyGate(count)
        self.encoding = HashEncoding(config.experts, backend)
        self.experts = ExpertMLP(count, [self.encoding.width, config.expert_hidden, config.outputs], bias=False)
        direction = 16 if config.direction_frequencies is None else encoded_width(3, config.direction_frequencies)
        features = config.outputs - (0 if config.head_sees_density else 1)
        self.head = bias_free_mlp([features + direction + config.appearance, *config.head, 3])
        self.appearance = nn.Embedding(config.images, config.appearance) if config.appearance else None

    def probabilities(self, x: Tensor) -> Tensor:
        """The gate's softmax (S, E) for points in [0, 1]^3; ones for a single expert."""
        if self.gate is None:
            return torch.ones(x.shape[0], 1, device=x.device)
        result: Tensor = self.gate(x)
        return result

    def forward(
        self, x: Tensor, direction: Tensor, image: Tensor | None = None, expert: Tensor | None = None
    ) -> FieldOutput:
        """Points (S, 3) in [0, 1], unit directions (S, 3), image numbers (S,). In training with capacity, in evaluation without.

        ``expert`` (S,) replaces the gate's choice by a fixed partition, with weight 1.
        """
        config = self.config
        if len(config.experts) == 1:  # nothing to route
            y = self.experts.one(self.encoding(x), 0)
            zero = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            return self._output(y, direction, image, y.new_zeros(()), zero, zero == 0)
        if expert is None:
            p = self.probabilities(x)
        else:
            p = F.one_hot(expert, len(config.experts)).to(torch.float32)
        limited = self.training and expert is None and config.capacity_factor is not None
        slots = capacity(x.shape[0], len(config.experts), config.capacity_factor or 1.0) if limited else None
        routed = dispatch(p, slots, config.prioritised)
        y = routed.combine(self.experts(self.encoding(routed.gather(x), routed.offsets), routed))
        balance = balance_loss(p, routed.expert) if expert is None else p.new_zeros(())
        return self._output(y, direction, image, balance, routed.expert, routed.kept)

    def _output(
        self, y: Tensor, direction: Tensor, image: Tensor | None, balance: Tensor, expert: Tensor, kept: Tensor
    ) -> FieldOutput:
        density = self._density(y[:, 0].float())
        return FieldOutput(density, self._colour(y, direction, image), balance, expert, kept)

    def _density(self, raw: Tensor) -> Tensor:
        return truncated_exp(raw) if self.config.density == "exp" else F.softplus(raw - 1.0)

    def _colour(self, y: Tensor, direction: Tensor, image: Tensor | None) -> Tensor:
        config = self.config
        if config.direction_frequencies is None:
            encoded = spherical_harmonics(direction)
        else:
            encoded = frequency_encoding(direction, config.direction_frequencies)
        parts = [y if config.head_sees_density else y[:, 1:], encoded.to(y.dtype)]
        if self.appearance is not None:
            if image is None:
                raise ValueError("a field with appearance embeddings needs the image of every point")
            parts.append(self.appearance(image).to(y.dtype))
        return torch.sigmoid(self.head(torch.cat(parts, dim=-1)).float())


class Proposal(nn.Module):
    """A small density field that says where the samples of the next round should lie (nerfacto)."""

    def __init__(self, grid: GridSpec, hidden: int = 16, backend: Backend = "auto") -> None:
        super().__init__()
        self.encoding = HashEncoding([grid], backend)
        self.mlp = bias_free_mlp([self.encoding.width, hidden, 1])

    def forward(self, x: Tensor) -> Tensor:
        """Points (S, 3) in [0, 1] -> density (S,)."""
        return truncated_exp(self.mlp(self.encoding(x))[:, 0].float())


def homogeneous(config: HMoHEConfig, n_min: int, n_max: int, experts: int | None = None) -> HMoHEConfig:
    """The same field with one range for all experts."""
    count = len(config.experts) if experts is None else experts
    return replace(config, experts=tuple(replace(config.experts[0], n_min=n_min, n_max=n_max) for _ in range(count)))
