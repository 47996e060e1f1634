"""Switch-NeRF (ICLR 2023), as in its public code: frequency encoding, a gate that sends each point to one of E expert MLPs.

Widths and layers are those of the released building configuration; parameter and MAC counts are in :mod:`counts`. Experts are
replicated on every GPU, so nothing crosses GPUs but gradients. ``MegaNeRF`` submodules and the background are :class:`NeRFMLP`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papers.switchnerf.encodings import frequency_encoding, full_precision
from papers.switchnerf.moe import ExpertMLP, balance_loss, capacity, dispatch


@dataclass(frozen=True)
class SwitchConfig:
    """The released building configuration; smaller numbers make the rival of the reduced scale."""

    experts: int = 8
    width: int = 256
    expert_layers: int = 7
    skip_after: int = 3
    position_frequencies: int = 12
    direction_frequencies: int = 4
    head_width: int = 128
    appearance: int = 48
    images: int = 1
    chunk: int = 131_072  # points routed together, each chunk with a capacity of its own
    capacity_factor: float = 1.0
    prioritised: bool = True
    density_noise: float = 1.0  # deviation of the noise before softplus, in training


@dataclass(frozen=True)
class FieldOutput:
    """What a radiance field says of S points, and what its gate did (None without a gate)."""

    density: Tensor  # (S,)
    colour: Tensor  # (S, 3) in [0, 1]
    balance: Tensor  # scalar loss, 0 without a gate
    expert: Tensor | None = None  # (S,)
    kept: Tensor | None = None  # (S,) bool


def encoded_width(inputs: int, frequencies: int) -> int:
    """Width of :func:`frequency_encoding`."""
    return inputs * (1 + 2 * frequencies)


class Head(nn.Module):
    """Density and colour from a feature, the direction and the image's appearance (Switch-NeRF, Mega-NeRF)."""

    def __init__(self, width: int, direction_frequencies: int, appearance: int, images: int, hidden: int) -> None:
        super().__init__()
        self.direction_frequencies = direction_frequencies
        self.density = nn.Linear(width, 1)
        self.feature = nn.Linear(width, width)
        self.appearance = nn.Embedding(images, appearance) if appearance else None
        self.hidden = nn.Linear(width + encoded_width(3, direction_frequencies) + appearance, hidden)
        self.colour = nn.Linear(hidden, 3)

    def embedded(self, image: Tensor | None) -> Tensor | None:
        """Appearance (S, D) of image numbers (S,); None for a field without. Raises ValueError without the numbers it needs."""
        if self.appearance is None:
            return None
        if image is None:
            raise ValueError("a field with appearance embeddings needs the image of every point")
        result: Tensor = self.appearance(image)
        return result

    def forward(self, h: Tensor, direction: Tensor, look: Tensor | None, noise: float) -> tuple[Tensor, Tensor]:
        """Density (S,) and colour (S, 3) from features, directions and :meth:`embedded` appearances."""
        raw = self.density(h)[:, 0].float()
        if noise:
            raw = raw + noise * torch.randn_like(raw)
        parts = [self.feature(h), frequency_encoding(direction, self.direction_frequencies)]
        if look is not None:
            parts.append(look)
        hidden = torch.relu(self.hidden(torch.cat([part.to(h.dtype) for part in parts], dim=-1)))
        return F.softplus(raw - 1.0), torch.sigmoid(self.colour(hidden).float())


class SwitchNeRF(nn.Module):
    """The foreground network: embed, gate, dispatch, experts, combine, head."""

    def __init__(self, config: SwitchConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.embed = nn.Linear(encoded_width(3, config.position_frequencies), width)
        self.gate = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.Linear(width, config.experts, bias=False),
        )
        self.experts = ExpertMLP(config.experts, [width] * (config.expert_layers + 1), skip_after=config.skip_after)
        self.head = Head(width, config.direction_frequencies, config.appearance, config.images, config.head_width)

    def forward(
        self, x: Tensor, direction: Tensor, image: Tensor | None = None, expert: Tensor | None = None
    ) -> FieldOutput:
        """Points (S, 3), unit directions (S, 3), image numbers (S,). In training with capacity, in evaluation without.

        ``expert`` (S,) replaces the gate's choice by a fixed partition of space (weight 1), as Mega-NeRF has it.
        """
        look, parts = self.head.embedded(image), []
        for start in range(0, x.shape[0], self.config.chunk):
            part = slice(start, start + self.config.chunk)
            some, fixed = (None if t is None else t[part] for t in (look, expert))
            parts.append(self.points(x[part], direction[part], some, fixed))
        density, colour, balance, chosen, kept = zip(*parts, strict=True)
        return FieldOutput(
            torch.cat(density), torch.cat(colour), torch.stack(balance).mean(), torch.cat(chosen), torch.cat(kept)
        )

    def points(
        self, x: Tensor, direction: Tensor, look: Tensor | None, fixed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Density, colour, balance loss, chosen expert and what was kept of one chunk: a graph of static shapes, to be compiled as one."""
        h, balance, chosen, kept = self._route(x, fixed)
        noise = self.config.density_noise if self.training else 0.0
        density, colour = self.head(torch.relu(h), direction, look, noise)
        return density, colour, balance, chosen, kept

    def probabilities(self, x: Tensor) -> Tensor:
        """The gate's softmax (S, E), in float32 whatever the autocast."""
        return self._gate(self.embedded(x))

    def embedded(self, x: Tensor) -> Tensor:
        """The experts' input (S, width)."""
        result: Tensor = self.embed(frequency_encoding(x, self.config.position_frequencies))
        return result

    def _gate(self, h: Tensor) -> Tensor:
        with full_precision(h):
            result: Tensor = torch.softmax(self.gate(h.float()), dim=-1)
        return result

    def _route(self, x: Tensor, fixed: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config = self.config
        h = self.embedded(x)
        if fixed is None:
            p = self._gate(h)
        else:
            p = F.one_hot(fixed, config.experts).to(torch.float32)
        limited = self.training and fixed is None
        slots = capacity(x.shape[0], config.experts, config.capacity_factor) if limited else None
        routed = dispatch(p, slots, config.prioritised)
        y = routed.combine(self.experts(routed.gather(h), routed))
        balance = balance_loss(p, routed.expert) if fixed is None else p.new_zeros(())
        return y, balance, routed.expert, routed.kept


class NeRFMLP(nn.Module):
    """The plain 8-layer NeRF of Mega-NeRF's submodules (3 inputs) and of the background (4: direction on the sphere, inverse radius)."""

    def __init__(
        self, inputs: int = 3, width: int = 256, layers: int = 8, skip: int = 4, frequencies: int = 12,
        direction_frequencies: int = 4, appearance: int = 48, images: int = 1, head_width: int = 128,
        density_noise: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.frequencies, self.skip, self.density_noise = frequencies, skip, density_noise
        first = encoded_width(inputs, frequencies)
        self.layers = nn.ModuleList(
            nn.Linear(first if i == 0 else width + (first if i == skip else 0), width) for i in range(layers)
        )
        self.head = Head(width, direction_frequencies, appearance, images, head_width)

    def forward(self, x: Tensor, direction: Tensor, image: Tensor | None = None) -> FieldOutput:
        """Points (S, inputs), unit directions (S, 3), image numbers (S,)."""
        encoded = frequency_encoding(x, self.frequencies)
        h = encoded
        for index, layer in enumerate(self.layers):
            h = torch.relu(layer(torch.cat([encoded.to(h.dtype), h], dim=-1) if index == self.skip else h))
        noise = self.density_noise if self.training else 0.0
        density, colour = self.head(h, direction, self.head.embedded(image), noise)
        return FieldOutput(density, colour, density.new_zeros(()))


def background(config: SwitchConfig) -> NeRFMLP:
    """The background network that goes with a Switch-NeRF."""
    return NeRFMLP(4, appearance=config.appearance, images=config.images, density_noise=config.density_noise)
