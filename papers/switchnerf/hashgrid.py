"""Multi-resolution hash grids (Instant-NGP) for one expert or for many with resolution ranges of their own.

A :class:`Layout` puts the tables of all experts and levels behind each other in one parameter, so that one call (and on a GPU one
kernel launch) serves all of them. :func:`encode_reference` is the oracle for the compiled forms in :mod:`hashgrid_numba` and
:mod:`hashgrid_triton`. Two public conventions exist: ``tcnn`` (tiny-cuda-nn: half-voxel shift, small levels dense) and ``torch``
(nerfstudio's fallback: no shift, always hashed).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError

PRIMES = (1, 2654435761, 805459861)  # spatial hash of Instant-NGP (Müller et al. 2022, eq. 4)
Convention: TypeAlias = Literal["tcnn", "torch"]
Backend: TypeAlias = Literal["auto", "reference", "numba", "triton"]
INIT_RANGE = {"tcnn": 1e-4, "torch": 1e-3}
_SNAP = 1e-6  # relative: growth factors are rounded, resolutions that should be whole numbers are made whole


@dataclass(frozen=True)
class Level:
    """One resolution level: positions are x·scale + shift in units of its voxels."""

    scale: float
    shift: float
    resolution: int  # vertices per axis
    dense: bool  # a vertex has an entry of its own
    entries: int


@dataclass(frozen=True)
class GridSpec:
    """A hash grid: ``levels`` resolutions from ``n_min`` to ``n_max`` in geometric steps, at most 2**log2_size entries each."""

    levels: int
    n_min: int
    n_max: int
    log2_size: int
    features: int = 2
    convention: Convention = "tcnn"

    def __post_init__(self) -> None:
        if self.levels < 1 or self.n_min < 1 or self.n_max < self.n_min or not 1 <= self.log2_size <= 30:
            raise UserError(
                f"a hash grid needs levels >= 1, 1 <= n_min <= n_max and log2_size in 1..30, got {self.levels}, "
                f"{self.n_min}, {self.n_max}, {self.log2_size}"
            )
        if self.convention not in INIT_RANGE:
            raise UserError(f"unknown hash grid convention '{self.convention}': use tcnn or torch")

    @property
    def growth(self) -> float:
        """b = (n_max / n_min)^(1 / (levels - 1)); 1 for a single level."""
        return (self.n_max / self.n_min) ** (1 / (self.levels - 1)) if self.levels > 1 else 1.0

    def level_table(self) -> tuple[Level, ...]:
        """Scale, resolution, kind and size of every level."""
        size = 1 << self.log2_size
        table = []
        for index in range(self.levels):
            exact = self.n_min * self.growth**index
            exact = float(round(exact)) if abs(exact - round(exact)) < _SNAP * exact else exact
            if self.convention == "torch":
                scale = math.floor(exact)
                table.append(Level(float(scale), 0.0, scale + 1, False, size))
                continue
            resolution = math.ceil(exact - 1.0) + 1
            dense = resolution**3 <= size
            entries = min(-(-(resolution**3) // 8) * 8, size) if dense else size
            table.append(Level(exact - 1.0, 0.5, resolution, dense, entries))
        return tuple(table)

    @property
    def entries(self) -> int:
        """Table entries over all levels."""
        return sum(level.entries for level in self.level_table())

    @property
    def num_parameters(self) -> int:
        """Trainable numbers: entries x features."""
        return self.entries * self.features

    @property
    def reads(self) -> int:
        """Table entries read per point: 8 corners on each level."""
        return 8 * self.levels


class Layout(nn.Module):
    """Where the levels of all experts lie in one table. Buffers have shape (experts, levels)."""

    scale: Tensor
    shift: Tensor
    resolution: Tensor
    dense: Tensor
    offset: Tensor
    mask: Tensor

    def __init__(self, specs: Sequence[GridSpec]) -> None:
        super().__init__()
        kinds = {(spec.levels, spec.features, spec.convention) for spec in specs}
        if len(kinds) != 1:
            raise UserError("the grids of all experts need the same number of levels, features and convention")
        self.num_experts, self.levels, self.features = len(specs), specs[0].levels, specs[0].features
        tables = [spec.level_table() for spec in specs]
        sizes = [level.entries for table in tables for level in table]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.entries = sum(sizes)

        def keep(name: str, values: list[list[Any]], dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.tensor(values, dtype=dtype), persistent=False)

        keep("scale", [[level.scale for level in table] for table in tables], torch.float32)
        keep("shift", [[level.shift for level in table] for table in tables], torch.float32)
        keep("resolution", [[level.resolution for level in table] for table in tables], torch.int64)
        keep("dense", [[level.dense for level in table] for table in tables], torch.bool)
        keep("mask", [[(1 << spec.log2_size) - 1] * self.levels for spec in specs], torch.int64)
        keep("offset", [starts[i : i + self.levels] for i in range(0, len(starts), self.levels)], torch.int64)

    @property
    def width(self) -> int:
        """Features per point: levels x features per entry."""
        return self.levels * self.features


def hash_index(corner: Tensor) -> Tensor:
    """Spatial hash of integer corners (..., 3), before the modulus: int64, equal to wrapped uint32 arithmetic modulo 2**k, k <= 32."""
    x, y, z = corner.unbind(-1)
    return x ^ (y * PRIMES[1]) ^ (z * PRIMES[2])


def encode_reference(x: Tensor, table: Tensor, layout: Layout, experts: Tensor | None = None) -> Tensor:
    """Features (S, levels·features) of points ``x`` (S, 3) in [0, 1], each in the grid of its expert; plain vectorised torch.

    Args:
        table: (entries, features).
        experts: (S,) expert of each point; None if there is one expert.
    """
    chosen = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device) if experts is None else experts
    scale, shift = layout.scale[chosen].to(x.dtype), layout.shift[chosen].to(x.dtype)  # (S, L)
    position = x[:, None, :] * scale[..., None] + shift[..., None]
    base = position.floor()
    fraction = (position - base)[:, :, None, :]
    steps = torch.arange(8, device=x.device)
    bits = torch.stack([steps & 1, (steps >> 1) & 1, steps >> 2], dim=-1)  # (8, 3)
    corner = base.to(torch.int64)[:, :, None, :] + bits  # (S, L, 8, 3)
    resolution = layout.resolution[chosen][..., None]
    # The upper face of a dense level: a clamped corner, where plain arithmetic would run into a foreign entry.
    inside = torch.minimum(corner, resolution[..., None] - 1)
    flat = inside[..., 0] + resolution * (inside[..., 1] + resolution * inside[..., 2])
    hashed = hash_index(corner) & layout.mask[chosen][..., None]
    index = torch.where(layout.dense[chosen][..., None], flat, hashed) + layout.offset[chosen][..., None]
    weight = torch.where(bits.bool(), fraction, 1.0 - fraction).prod(dim=-1)  # (S, L, 8)
    values = F.embedding(index, table)
    return (weight[..., None].to(table.dtype) * values).sum(dim=2).flatten(1)


def experts_of(offsets: Tensor, points: int) -> Tensor:
    """Expert of each of ``points`` sorted points from segment bounds ``offsets`` (E + 1,)."""
    return torch.searchsorted(offsets[1:].contiguous(), torch.arange(points, device=offsets.device), right=True)


class HashEncoding(nn.Module):
    """Hash grids of one or more experts; points come sorted by expert.

    Args:
        specs: one grid per expert.
        backend: ``auto`` takes Triton on CUDA, compiled loops on the CPU, and the reference for other types and devices.
    """

    def __init__(self, specs: Sequence[GridSpec], backend: Backend = "auto") -> None:
        super().__init__()
        self.layout = Layout(specs)
        self.backend = backend
        bound = INIT_RANGE[specs[0].convention]
        self.table = nn.Parameter(torch.empty(self.layout.entries, self.layout.features).uniform_(-bound, bound))

    @property
    def width(self) -> int:
        """Features per point."""
        return self.layout.width

    def forward(self, x: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Features (S, width) of points (S, 3) in [0, 1]; ``offsets`` (E + 1,) bounds each expert's segment.

        The compiled forms give no gradient with respect to ``x``; they refuse points that want one.
        """
        if offsets is None and self.layout.num_experts > 1:
            raise ValueError("points of several experts come with the bounds of their segments")
        backend = self._choose(x)
        if backend == "reference":
            experts = None if offsets is None else experts_of(offsets, x.shape[0])
            return encode_reference(x, self.table, self.layout, experts)
        if x.requires_grad:
            raise ValueError("compiled hash encodings have no gradient for positions: use backend='reference'")
        if offsets is None:
            offsets = torch.arange(2, device=x.device) * x.shape[0]  # made on the device: nothing waits for a copy
        if backend == "numba":
            from papers.switchnerf.hashgrid_numba import encode
        else:
            from papers.switchnerf.hashgrid_triton import encode
        result: Tensor = encode(x.contiguous(), self.table, offsets, self.layout)
        return result

    def _choose(self, x: Tensor) -> str:
        if self.backend != "auto":
            return self.backend
        if x.is_meta or self.table.dtype == torch.float64:
            return "reference"
        return "triton" if x.is_cuda else "numba"
