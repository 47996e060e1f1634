"""Hyperdimensional encoding of several layers, class exemplars, and the out-of-distribution test on them (heading 3.2 "Deep HDC").

The recipe follows HDFF with the changes that it needs (no centring, per-tap normalisation): tap l is pooled to G x G, flattened to
u_l, scaled to unit length, projected by P_l into D dimensions; the taps are added (bundled); q = l2norm(sum_l u_l P_l). A class
exemplar is the normalised sum of the q of its images. An image is out of distribution when its largest cosine to an exemplar of
every known domain lies below that domain's threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError, unknown

Projection = Literal["orthogonal", "joint", "gaussian", "hadamard"]
Center = Literal["none", "scalar", "channel"]
Norm = Literal["raw", "l2", "std"]
Pool = Literal["avg", "max"]


@dataclass(frozen=True)
class HDSettings:
    """How taps become hypervectors; the defaults are the detector of this package, :data:`HDFF` the published one.

    ``projection``: ``orthogonal`` (an orthonormal matrix per tap), ``joint`` (one over all taps), ``gaussian`` / sqrt(D), or
    ``hadamard`` (random signs and a Walsh-Hadamard transform: no matrix is stored). ``binary`` keeps signs alone.
    """

    dim: int = 2048
    grid: int = 2
    projection: Projection = "orthogonal"
    center: Center = "none"
    norm: Norm = "l2"
    pool: Pool = "avg"
    unit: bool = True  # whether single images are scaled to unit length before bundling
    binary: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for field, allowed in (("projection", Projection), ("center", Center), ("norm", Norm), ("pool", Pool)):
            if getattr(self, field) not in get_args(allowed):
                raise unknown(field, getattr(self, field), get_args(allowed))
        if self.dim < 1 or self.grid < 1:
            raise UserError(f"dim={self.dim} and grid={self.grid} must be at least 1")


_SMALL_TAP = 49  # h w up to which taps are pooled by a product

HDFF = HDSettings(dim=10_000, grid=1, center="scalar", norm="raw", pool="max", unit=False)


def orthogonal_rows(rows: int, dim: int, generator: torch.Generator) -> Tensor:
    """A (rows, dim) matrix: orthonormal rows if rows <= dim (inner products are kept exactly), else orthonormal columns."""
    q, r = torch.linalg.qr(torch.randn(max(rows, dim), min(rows, dim), generator=generator, dtype=torch.float64))
    q = (q * torch.sign(torch.diagonal(r))).float()
    return q.T.contiguous() if rows <= dim else q


def hadamard_transform(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last axis, whose length is a power of two: n log2 n additions."""
    n = x.shape[-1]
    if n & (n - 1):
        raise UserError(f"a Hadamard transform needs a power of two, got {n}")
    shape, half = x.shape, 1
    while half < n:
        x = x.reshape(*shape[:-1], n // (2 * half), 2, half)
        x = torch.stack((x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]), dim=-2)
        half *= 2
    return x.reshape(shape) / math.sqrt(n)


class HDEncoder(nn.Module):
    """Taps -> hypervectors (B, D).

    Args:
        channels: channels of each tap.
        settings: see :class:`HDSettings`.
    """

    def __init__(self, channels: Sequence[int], settings: HDSettings | None = None) -> None:
        super().__init__()
        self.channels, self.settings = tuple(channels), settings or HDSettings()
        s = self.settings
        self.widths = tuple(c * s.grid**2 for c in self.channels)
        generator = torch.Generator().manual_seed(s.seed)
        if s.projection == "hadamard":
            total = sum(self.widths)
            self.padded = 1 << (max(s.dim, total) - 1).bit_length()
            self._derive("signs", torch.randint(0, 2, (total,), generator=generator) * 2.0 - 1.0)
            self._derive("slots", torch.randperm(self.padded, generator=generator)[:total])
            self._derive("kept", torch.randperm(self.padded, generator=generator)[: s.dim])
        else:
            self._derive("matrix", torch.cat(self._matrices(generator)))
        for index, c in enumerate(self.channels):
            self.register_buffer(f"offset{index}", torch.zeros(c))
            self.register_buffer(f"spread{index}", torch.ones(c))

    def _derive(self, name: str, value: Tensor) -> None:
        """A buffer that follows from the seed and is therefore never saved."""
        self.register_buffer(name, value, persistent=False)

    def _matrices(self, generator: torch.Generator) -> list[Tensor]:
        dim = self.settings.dim
        if self.settings.projection == "joint":
            return [orthogonal_rows(sum(self.widths), dim, generator)]
        if self.settings.projection == "gaussian":
            return [torch.randn(w, dim, generator=generator) / math.sqrt(dim) for w in self.widths]
        return [orthogonal_rows(w, dim, generator) for w in self.widths]

    @torch.no_grad()
    def fit(self, taps: Sequence[Tensor]) -> HDEncoder:
        """Estimate what ``center`` and ``norm=std`` need; means are averages even when taps are pooled by maximum, as in HDFF."""
        for index, tap in enumerate(taps):
            mean = tap.mean((2, 3))
            if self.settings.center == "channel":
                self._set(f"offset{index}", mean.mean(0))
            elif self.settings.center == "scalar":
                self._set(f"offset{index}", mean.mean().expand(tap.shape[1]))
            if self.settings.norm == "std":
                self._set(f"spread{index}", mean.std(0).clamp_min(1e-6))
        return self

    def _set(self, name: str, value: Tensor) -> None:
        getattr(self, name).copy_(value)

    def descriptors(self, taps: Sequence[Tensor]) -> list[Tensor]:
        """u_l of each tap: (B, c_l G^2)."""
        s, result = self.settings, []
        for index, tap in enumerate(taps):
            pool = F.adaptive_max_pool2d if s.pool == "max" else F.adaptive_avg_pool2d
            if tap.shape[-2:] != (s.grid, s.grid):
                tap = pool(tap, s.grid)
            if s.center != "none":
                tap = tap - getattr(self, f"offset{index}").view(1, -1, 1, 1)
            if s.norm == "std":
                tap = tap / getattr(self, f"spread{index}").view(1, -1, 1, 1)
            u = tap.flatten(1)
            result.append(F.normalize(u, dim=1) if s.norm == "l2" else u)
        return result

    def project(self, descriptors: Sequence[Tensor | None]) -> Tensor:
        """sum_l u_l P_l, not normalised; ``None`` leaves a tap out."""
        present = [(i, u) for i, u in enumerate(descriptors) if u is not None]
        if not present:
            raise UserError("no tap is in use: at least one has to be")
        starts = [sum(self.widths[:i]) for i in range(len(self.widths))]
        if self.settings.projection != "hadamard":
            if len(present) == len(self.widths):
                return torch.cat([u for _, u in present], 1) @ self.matrix
            rows = torch.cat([self.matrix[starts[i] : starts[i] + self.widths[i]] for i, _ in present])
            return torch.cat([u for _, u in present], 1) @ rows
        # The taps have slots of their own, so one transform serves them all: orthonormal before the subsampling to D.
        first = present[0][1]
        spread = first.new_zeros(len(first), self.padded)
        for i, u in present:
            rows = slice(starts[i], starts[i] + self.widths[i])
            spread[:, self.slots[rows]] = u * self.signs[rows]
        return hadamard_transform(spread)[:, self.kept] * math.sqrt(self.padded / self.settings.dim)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Taps -> q (B, D), of unit length unless ``unit`` is off, of signs if ``binary``."""
        q = self.project(self.descriptors(taps))
        if self.settings.binary:
            return sign(q)
        return F.normalize(q, dim=1) if self.settings.unit else q


def grid_pool(tap: Tensor, grid: int) -> Tensor:
    """Adaptive average pooling of (B, c, h, w) to G x G, flattened to (B, c G^2).

    Small taps are pooled by a product with a fixed matrix: windows that overlap (3 x 3 to 2 x 2) have a slow kernel on CPUs.
    """
    height, width = tap.shape[-2:]
    if (height, width) == (grid, grid):
        return tap.flatten(1)
    if tap.device.type != "cpu" or height * width > _SMALL_TAP:
        return F.adaptive_avg_pool2d(tap, grid).flatten(1)
    return (tap.flatten(2) @ _pooling_matrix(height, width, grid).to(tap.dtype)).flatten(1)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a matrix made in inference mode could not be trained through later
def _pooling_matrix(height: int, width: int, grid: int) -> Tensor:
    positions = torch.eye(height * width).view(height * width, 1, height, width)
    return F.adaptive_avg_pool2d(positions, grid).flatten(1)


@lru_cache(maxsize=8)
def shared_encoder(channels: tuple[int, ...], settings: HDSettings) -> HDEncoder:
    """One projection for all heads with the same settings: D x sum(c G^2) floats are held once, whatever the number of domains.

    It has nothing to fit: heads normalise each tap by its length.
    """
    return HDEncoder(channels, settings).eval()


def sign(x: Tensor) -> Tensor:
    """+1 or -1, +1 at zero: a hypervector has no zeros."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def bundle(q: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sum of the hypervectors of each class: (classes, D), not normalised. Order-free, so exemplars grow by adding."""
    return q.new_zeros(classes, q.shape[1]).index_add(0, labels, q)


def cosine(q: Tensor, exemplars: Tensor) -> Tensor:
    """Cosines (B, K); the cosine to an exemplar of zeros (a class not seen) is 0."""
    return F.normalize(q, dim=1) @ F.normalize(exemplars, dim=1).T


@dataclass(frozen=True)
class DomainMemory:
    """What is stored of a domain: exemplars of its classes, the threshold, and mean and spread of held-out scores."""

    exemplars: Tensor  # (K, D), unit length, or signs
    seen: Tensor  # (K,) bool
    threshold: float
    held_out: Tensor  # sorted scores of images that were not bundled

    def score(self, q: Tensor) -> Tensor:
        """s_d(x) = max_k cos(q(x), E_dk) over the classes seen: larger is more familiar."""
        return cosine(q, self.exemplars[self.seen]).max(1).values

    @property
    def mean(self) -> float:
        """Mean of the held-out scores."""
        return float(self.held_out.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the held-out scores."""
        return float(self.held_out.std().clamp_min(1e-6))


def remember(
    q: Tensor,
    labels: Tensor,
    classes: int,
    *,
    held_out_fraction: float = 0.1,
    percentile: float = 5.0,
    binary: bool = False,
    seed: int = 0,
) -> DomainMemory:
    """Exemplars and threshold of a domain: the threshold is the percentile of scores of images held out of the bundling.

    Raises:
        UserError: too few images to hold any out.
    """
    n_held = round(len(q) * held_out_fraction)
    if n_held < 2 or n_held >= len(q):
        raise UserError(f"{len(q)} images are too few to hold {held_out_fraction:.0%} of them out for the threshold")
    order = torch.randperm(len(q), generator=torch.Generator().manual_seed(seed))
    held, kept = order[:n_held], order[n_held:]
    total = bundle(q[kept], labels[kept], classes)
    seen = torch.bincount(labels[kept], minlength=classes) > 0
    exemplars = sign(total) if binary else F.normalize(total, dim=1)
    scores = DomainMemory(exemplars, seen, 0.0, torch.zeros(2)).score(q[held]).sort().values
    return DomainMemory(exemplars, seen, float(torch.quantile(scores, percentile / 100)), scores)
