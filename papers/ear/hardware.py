"""What EAR costs on an edge board: latency bound, remedies for the projection, training cost, memory that grows with the domains.

A part of the system takes t = max(2 MACs / peak, bytes / bandwidth): a lower bound at the device's peaks. At batch 1 the dense
projection of the hyperdimensional head streams D sum(c_l G^2) floats per image, so it is bound by memory whatever its share of MACs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from typing import Literal, get_args

from papers.ear.counts import EncoderCounts, projection_entries
from shared.errors import UserError, unknown
from shared.hardware import Device

Form = Literal["dense", "binary", "hadamard", "seeded"]
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True)
class Part:
    """Work and traffic of one part for a batch. ``ops`` counts 2 per MAC and 2 per lone addition: peaks count a fused multiply-add
    as two, and an addition takes the same slot.
    """

    name: str
    ops: float
    bytes: float

    def bound_s(self, device: Device, dtype: str = "fp32") -> float:
        """Time at the device's peaks, s."""
        return max(self.ops / device.op_per_s(dtype), self.bytes / device.bandwidth_bytes_per_s())

    def bound_by(self, device: Device, dtype: str = "fp32") -> str:
        """``compute`` or ``memory``."""
        slow = self.bytes / device.bandwidth_bytes_per_s() > self.ops / device.op_per_s(dtype)
        return "memory" if slow else "compute"


def encoder_part(counts: EncoderCounts, batch: int = 1) -> Part:
    """The frozen encoder: weights read once per batch, taps written once per image."""
    taps = sum(c * h * w for c, h, w in counts.tap_shapes)
    return Part("encoder", 2.0 * batch * counts.macs, 4.0 * (counts.headless_params + batch * taps))


def padded_dim(dim: int, width: int) -> int:
    """D': the next power of two that holds the hypervector and the descriptors."""
    return 1 << (max(dim, width) - 1).bit_length()


def projection_part(
    counts: EncoderCounts, dim: int, form: Form = "dense", *, grid: int = 1, batch: int = 1, element_bytes: int = 4
) -> Part:
    """The projection of a batch. ``binary``: a matrix of signs, additions alone. ``hadamard``: a transform per tap, signs stored.
    ``seeded``: signs made on the fly, once per batch, a random word for each 32 of them; nothing stored.

    Raises:
        UserError: no such form.
    """
    entries = projection_entries(counts.channels, dim, grid)
    width = sum(c * grid**2 for c in counts.channels)
    io = 4.0 * batch * (width + dim)
    if form == "dense":
        return Part("HDC projection, dense", 2.0 * batch * entries, element_bytes * entries + io)
    if form == "binary":
        return Part("HDC projection, 1-bit", 2.0 * batch * entries, entries / 8 + io)
    if form == "hadamard":
        n = padded_dim(dim, max(c * grid**2 for c in counts.channels))
        taps = len(counts.channels)
        return Part("HDC projection, Hadamard", 2.0 * batch * taps * n * log2(n), taps * n / 8 + io)
    if form == "seeded":
        return Part("HDC projection, seeded", 2.0 * (batch * entries + entries / 32), io)
    raise unknown("projection form", form, FORMS)


def similarity_part(domains: int, classes: int, dim: int, *, binary: bool = False, batch: int = 1) -> Part:
    """Cosines to all exemplars of all domains."""
    entries = domains * classes * dim
    if binary:  # XOR, popcount and addition of 64-bit words, a slot each
        return Part("similarity, packed", 6.0 * batch * entries / 64, entries / 8 + batch * dim / 8)
    return Part("similarity", 2.0 * batch * entries, 4.0 * (entries + batch * dim))


# --- training ---


def training_share(encoder_macs: float, adaptor_macs: float, epochs: int, *, cached: bool = True) -> float:
    """MACs of adapting to a domain over those of a full fine-tune, per image: (F + 3 E A) / (3 E F); a backward pass is two forward ones.

    Without the cache the encoder runs in every epoch: (E F + 3 E A) / (3 E F).
    """
    encoder = encoder_macs if cached else epochs * encoder_macs
    return (encoder + 3.0 * epochs * adaptor_macs) / (3.0 * epochs * encoder_macs)


def search_macs(
    encoder_macs: float, adaptor_macs: float, *, candidates: int, batch: int = 256, samples: int = 16
) -> float:
    """MACs of the zero-shot search: n F once, and per candidate 6 n A of warm-up passes and 3 m A of the tangent kernel."""
    return batch * encoder_macs + candidates * (6 * batch + 3 * samples) * adaptor_macs


# --- energy ---


@dataclass(frozen=True)
class EventEnergy:
    """Energy of single events, J: 45 nm at 0.9 V (PMC8934428, Tab. 3; DRAM and the 1-bit step are assumptions)."""

    mac_j: float
    dram_word_j: float  # 32 bits
    binary_step_j: float

    def inference_j(self, macs: float, dram_bytes: float, binary_steps: float = 0.0) -> float:
        """Energy of one image by counting events."""
        return macs * self.mac_j + dram_bytes / 4 * self.dram_word_j + binary_steps * self.binary_step_j


# --- memory and growth ---


@dataclass(frozen=True)
class Growth:
    """Bytes that EAR holds: once, and for every domain."""

    encoder_bytes: float
    projection_bytes: float
    adaptor_bytes: float  # of one domain
    head_bytes: float  # C and exemplars of one domain

    def total_bytes(self, domains: int) -> float:
        """With ``domains`` domains."""
        return self.encoder_bytes + self.projection_bytes + domains * (self.adaptor_bytes + self.head_bytes)

    def domains_that_fit(self, memory_bytes: float) -> int:
        """How many domains a memory holds; 0 if not even the encoder and the projection fit with one."""
        left = memory_bytes - self.encoder_bytes - self.projection_bytes
        return max(0, int(left // (self.adaptor_bytes + self.head_bytes)))


def growth(
    counts: EncoderCounts,
    adaptor_params: int,
    classes: int,
    dim: int,
    form: Form = "dense",
    *,
    binary_head: bool = False,
) -> Growth:
    """Memory of EAR in fp32; a binary head keeps one bit per entry of C and of the exemplars."""
    stored = {
        "dense": 4.0 * projection_entries(counts.channels, dim),
        "binary": projection_entries(counts.channels, dim) / 8,
        "hadamard": len(counts.channels) * padded_dim(dim, max(counts.channels)) / 8,
        "seeded": 0.0,
    }
    if form not in stored:
        raise unknown("projection form", form, FORMS)
    head = 2 * classes * dim * (1 / 8 if binary_head else 4.0)
    return Growth(4.0 * counts.headless_params, stored[form], 4.0 * adaptor_params, head)


@dataclass(frozen=True)
class BoardPlan:
    """What a board can do with a configuration of EAR."""

    device: str
    form: str
    binary_head: bool
    latency_s: float
    projection_share: float
    domains: int
    cache_images: int  # images of one new domain whose pooled taps fit beside all that


def plan_board(
    device: Device,
    counts: EncoderCounts,
    *,
    adaptor_params: int,
    adaptor_macs: int,
    classes: int,
    dim: int,
    form: Form,
    binary_head: bool,
    reserve_bytes: float,
    memory_bytes: float | None = None,
    domains_in_use: int = 4,
) -> BoardPlan:
    """Latency of one image and how many domains fit a board.

    Args:
        reserve_bytes: for the system, activations and the runtime.
        memory_bytes: the board's memory, where its file gives none (a board sold in several sizes).
        domains_in_use: domains whose exemplars are compared, for the latency.

    Raises:
        UserError: the memory is unknown or smaller than the reserve.
    """
    size = memory_bytes if memory_bytes is not None else device.size_bytes()
    free = size - reserve_bytes
    if free <= 0:
        raise UserError(f"device '{device.id}' has {size:.3g} bytes, less than the reserve of {reserve_bytes:.3g}")
    parts: Mapping[str, Part] = {
        "encoder": encoder_part(counts),
        "projection": projection_part(counts, dim, form),
        "similarity": similarity_part(domains_in_use, classes, dim, binary=binary_head),
        "adaptor": Part("adaptor", 2.0 * adaptor_macs, 4.0 * adaptor_params),
    }
    seconds = {name: part.bound_s(device) for name, part in parts.items()}
    memory = growth(counts, adaptor_params, classes, dim, form, binary_head=binary_head)
    each = 4 * sum(c * p for c, p in zip(counts.channels, counts.positions(7), strict=True))
    left = free - memory.total_bytes(domains_in_use)
    return BoardPlan(
        device.id, form, binary_head, sum(seconds.values()), seconds["projection"] / sum(seconds.values()),
        memory.domains_that_fit(free), max(0, int(left // each)),
    )  # fmt: skip
