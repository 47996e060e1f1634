"""The second calibration point: Edge-MoE (ICCAD 2023), the published HLS design of the same authors on a ZCU102 board.

Its unit sizes are public, so the mechanism of :mod:`papers.m3vit.hardware` can be held against a measured latency that played no part
in it. The units: one 16 x 16 multiplier array for all linear layers, attention products over 4 queries and 8 channels at a time, a
patch unit of 16 pixels and 8 channels, a router of 8 channels and N experts, weights through one 256-bit port.
"""

from __future__ import annotations

from dataclasses import dataclass

from numpy.typing import ArrayLike

from papers.m3vit import counts, hardware
from papers.m3vit.counts import Encoder

ENCODER = Encoder(dim=192, mlp_hidden=768, expert_hidden=384, top_k=2)
HEIGHT, WIDTH = 128, 256
TOKENS = HEIGHT * WIDTH // ENCODER.patch_size**2 + 1


@dataclass(frozen=True)
class Units:
    """Multiplies per cycle of each unit, and the weight port."""

    clock_hz: float
    linear_macs_per_cycle: int
    product_macs_per_cycle: int
    patch_macs_per_cycle: int
    router_macs_per_cycle: int
    port_bytes_per_cycle: int
    weight_bytes: int


@dataclass(frozen=True)
class EdgeMoE:
    """Modelled latency by unit, in seconds; the units run one after the other."""

    patch_embedding_s: float
    projections_s: float
    attention_products_s: float
    mlp_s: float
    router_s: float
    experts_s: float
    exposed_load_s: float  # waiting for experts in spite of double buffering
    token_order_load_s: float  # what loading every miss of a previous-token cache would add

    @property
    def total_s(self) -> float:
        """Latency of one frame."""
        compute = self.patch_embedding_s + self.projections_s + self.attention_products_s + self.mlp_s + self.router_s
        return compute + self.experts_s + self.exposed_load_s


def macs() -> int:
    """MACs of one frame of one task, encoder only."""
    return int(counts.sum_counts(counts.encoder_macs(ENCODER, TOKENS)))


def load_s(units: Units) -> float:
    """Time to load one expert through the weight port."""
    size = int(counts.expert_parameters(ENCODER)) * units.weight_bytes
    return size / (units.port_bytes_per_cycle * units.clock_hz)


def token_s(units: Units) -> float:
    """Time of one token in one expert."""
    return 2.0 * float(ENCODER.dim * ENCODER.expert_hidden) / (units.linear_macs_per_cycle * units.clock_hz)


def latency(units: Units, queues: ArrayLike) -> EdgeMoE:
    """Latency of one frame for the given queues, shape (layers, N): Σ K·T tokens a layer."""
    parts = {name: float(value) for name, value in counts.encoder_macs(ENCODER, TOKENS).items()}
    waiting = float(hardware.exposed_load_s(queues, token_s(units), load_s(units)).sum())
    misses = ENCODER.num_moe_blocks * float(hardware.expected_misses(ENCODER, TOKENS))
    return EdgeMoE(
        patch_embedding_s=parts["patch_embedding"] / (units.patch_macs_per_cycle * units.clock_hz),
        projections_s=parts["projections"] / (units.linear_macs_per_cycle * units.clock_hz),
        attention_products_s=parts["attention_products"] / (units.product_macs_per_cycle * units.clock_hz),
        mlp_s=parts["mlp"] / (units.linear_macs_per_cycle * units.clock_hz),
        router_s=parts["router"] / (units.router_macs_per_cycle * units.clock_hz),
        experts_s=parts["experts"] / (units.linear_macs_per_cycle * units.clock_hz),
        exposed_load_s=waiting,
        token_order_load_s=misses * load_s(units),
    )
