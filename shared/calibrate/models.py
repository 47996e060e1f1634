"""The models of the held-out validation. None of them, and no shape of theirs, takes part in a fit.

A paper adds its own by ``papers/<name>/held_out.py`` with a function ``held_out_models() -> list[HeldOut]``; the folder is found,
nothing is registered. Inputs and weights are random: the time of these models does not depend on values, apart from that of routed
experts, whose load a random router leaves balanced.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Built = tuple[Callable[..., Any], tuple[Tensor, ...]]


@dataclass(frozen=True)
class HeldOut:
    """A model of the validation. ``build(batch, dtype, device)`` gives it in evaluation mode with its inputs, on ``meta`` too.

    ``cpu_batches`` are timed on a CPU, where large batches take long; ``gpu_batches`` on a GPU, the largest in half precision alone.
    ``dtypes`` are those that the model runs in.
    """

    name: str
    build: Callable[[int, torch.dtype, str], Built]
    cpu_batches: tuple[int, ...] = (1, 8)
    gpu_batches: tuple[int, ...] = (16, 64, 256)
    dtypes: tuple[str, ...] = ("fp32", "bf16")


def _timm(name: str, size: int = 224) -> Callable[[int, torch.dtype, str], Built]:
    def build(batch: int, dtype: torch.dtype, device: str) -> Built:
        import timm

        with torch.device(device):
            model = timm.create_model(name).to(dtype).eval()
            return model, (torch.randn(batch, 3, size, size, dtype=dtype),)

    return build


class RoutedExperts(nn.Module):
    """A plain layer of top-2 routed experts with a fixed capacity: gather, two batched products, weighted scatter.

    Args:
        width, hidden: of tokens and inside an expert.
        num_experts: experts; each takes at most 1.25 times its share of the token-expert pairs.
    """

    def __init__(self, width: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.router = nn.Linear(width, num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(num_experts, width, hidden) * width**-0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden, width) * hidden**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, width) -> (n, width)."""
        n, width = tokens.shape
        capacity = -(-n * 5 // (2 * self.num_experts))  # 1.25 x 2 n / experts
        weight, expert = self.router(tokens).softmax(-1).topk(2, -1)
        order = expert.flatten().argsort(stable=True)
        expert_of = expert.flatten()[order]
        first = torch.searchsorted(expert_of, torch.arange(self.num_experts, device=tokens.device))
        place = torch.arange(2 * n, device=tokens.device) - first[expert_of]
        slot = torch.where(
            place < capacity, expert_of * capacity + place, self.num_experts * capacity
        )  # the last row is dropped
        packed = tokens.new_zeros(self.num_experts * capacity + 1, width)
        packed[slot] = tokens[order.div(2, rounding_mode="floor")]
        hidden = torch.bmm(packed[:-1].view(self.num_experts, capacity, width), self.up)
        packed[:-1] = torch.bmm(nn.functional.gelu(hidden), self.down).view(-1, width)
        gathered = packed[slot] * weight.flatten()[order].unsqueeze(1)
        return torch.zeros_like(tokens).index_add_(0, order.div(2, rounding_mode="floor"), gathered)


class HashGrid(nn.Module):
    """Multi-resolution hash encoding of points in the unit cube (8 corners, 16 levels, 2 features) and a small network."""

    resolution: Tensor
    corners: Tensor
    primes: Tensor

    def __init__(self, levels: int = 16, log2_size: int = 19, width: int = 64) -> None:
        super().__init__()
        self.size = 2**log2_size
        self.tables = nn.Parameter(torch.randn(levels, self.size, 2) * 1e-4)
        self.register_buffer("resolution", torch.tensor([16 * 1.38**level for level in range(levels)]))
        self.register_buffer("corners", torch.tensor([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)]))
        self.register_buffer("primes", torch.tensor([1, 2654435761, 805459861]))
        self.network = nn.Sequential(
            nn.Linear(2 * levels, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, points: Tensor) -> Tensor:
        """(n, 3) -> (n, 4)."""
        encoded = []
        for level, table in enumerate(self.tables):
            scaled = points * self.resolution[level]
            low = scaled.floor()
            part = (scaled - low).unsqueeze(1)
            corner = low.long().unsqueeze(1) + self.corners
            hashed = corner * self.primes
            index = (hashed[..., 0] ^ hashed[..., 1] ^ hashed[..., 2]) % self.size
            weight = torch.where(self.corners.bool(), part, 1 - part).prod(-1, keepdim=True)
            encoded.append((table[index] * weight).sum(1))
        out: Tensor = self.network(torch.cat(encoded, 1))
        return out


class Reservoir(nn.Module):
    """A liquid state machine: leaky integrate-and-fire neurons with a random recurrent matrix, stepped in time, and a linear readout."""

    def __init__(self, inputs: int = 64, neurons: int = 1024, classes: int = 10, steps: int = 20) -> None:
        super().__init__()
        self.steps = steps
        self.feed = nn.Linear(inputs, neurons)
        self.recurrent = nn.Linear(neurons, neurons, bias=False)
        self.readout = nn.Linear(neurons, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs) of constant current -> (batch, classes)."""
        current = self.feed(x)
        potential, spikes, count = torch.zeros_like(current), torch.zeros_like(current), torch.zeros_like(current)
        for _ in range(self.steps):
            potential = potential * 0.9 + current + self.recurrent(spikes)
            spikes = (potential > 1).to(x.dtype)
            potential = potential - spikes
            count = count + spikes
        out: Tensor = self.readout(count)
        return out


def _tokens(batch: int, dtype: torch.dtype, device: str) -> Built:
    with torch.device(device):
        return RoutedExperts(384, 1536, 8).to(dtype).eval(), (torch.randn(196 * batch, 384, dtype=dtype),)


def _points(batch: int, dtype: torch.dtype, device: str) -> Built:
    with torch.device(device):
        return HashGrid().to(dtype).eval(), (torch.rand(4096 * batch, 3, dtype=dtype),)


def _spikes(batch: int, dtype: torch.dtype, device: str) -> Built:
    with torch.device(device):
        return Reservoir().to(dtype).eval(), (torch.randn(batch, 64, dtype=dtype),)


BUILT_IN = (
    HeldOut("deit_tiny_patch16_224", _timm("deit_tiny_patch16_224")),
    HeldOut("deit_small_patch16_224", _timm("deit_small_patch16_224")),
    HeldOut("deit_base_patch16_224", _timm("deit_base_patch16_224"), cpu_batches=(1, 2)),
    HeldOut("mobilenetv2_100", _timm("mobilenetv2_100")),
    HeldOut("mobilenetv3_large_100", _timm("mobilenetv3_large_100")),
    HeldOut("resnet50", _timm("resnet50"), cpu_batches=(1, 4)),
    HeldOut("routed_experts_384", _tokens),
    HeldOut("hash_grid_16x2", _points),
    HeldOut("reservoir_1024", _spikes, cpu_batches=(1, 64)),
)


def held_out_models() -> list[HeldOut]:
    """The built-in models and those of the papers."""
    from shared.runner.papers import paper_names
    from shared.runner.paths import PAPERS

    found = list(BUILT_IN)
    for name in paper_names():
        if (PAPERS / name / "held_out.py").exists():
            found += importlib.import_module(f"papers.{name}.held_out").held_out_models()
    return found
