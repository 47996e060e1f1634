"""Cameras, rays, depth bounds, samples along rays and compositing.

Cameras are 3 x 4 matrices whose columns are right, up, back and the centre; pixel centres lie at +0.5. World axes are free: Mega-NeRF
scenes have x down, the procedural city has z up, so :class:`Altitude` says which way is down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-8  # of transmittance and of the pdf, as in the public code


@dataclass(frozen=True)
class Camera:
    """A pinhole camera; ``pose`` is (3, 4), focal lengths and centre are in pixels."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    pose: Tensor

    def scaled(self, factor: int) -> Camera:
        """The camera of images ``factor`` times smaller. Raises ValueError where the size does not divide."""
        if self.width % factor or self.height % factor:
            raise ValueError(f"images of {self.width} x {self.height} pixels cannot be scaled down by {factor}")
        fx, fy, cx, cy = (value / factor for value in (self.fx, self.fy, self.cx, self.cy))
        return Camera(self.width // factor, self.height // factor, fx, fy, cx, cy, self.pose)

    def directions(self) -> Tensor:
        """Unit directions (height, width, 3) of all pixels in world axes."""
        device = self.pose.device
        v, u = torch.meshgrid(
            torch.arange(self.height, device=device) + 0.5, torch.arange(self.width, device=device) + 0.5, indexing="ij"
        )
        local = torch.stack([(u - self.cx) / self.fx, (self.cy - v) / self.fy, -torch.ones_like(u)], dim=-1)
        return torch.nn.functional.normalize(local @ self.pose[:, :3].T, dim=-1)

    def rays(self, near: float, far: float, image: int = 0) -> Rays:
        """One ray per pixel, row by row."""
        direction = self.directions().flatten(0, 1)
        origin = self.pose[:, 3].expand_as(direction)
        full = torch.full((len(direction),), near, device=direction.device)
        number = torch.full((len(direction),), image, dtype=torch.int64, device=direction.device)
        return Rays(origin, direction, full, torch.full_like(full, far), number)


@dataclass(frozen=True)
class Rays:
    """R rays: origin and unit direction (R, 3), depth bounds (R,), image number (R,)."""

    origin: Tensor
    direction: Tensor
    near: Tensor
    far: Tensor
    image: Tensor

    def __len__(self) -> int:
        return len(self.origin)

    def map(self, f: Callable[[Tensor], Tensor]) -> Rays:
        """``f`` on every tensor: an index, a device."""
        return Rays(f(self.origin), f(self.direction), f(self.near), f(self.far), f(self.image))

    def at(self, depth: Tensor) -> Tensor:
        """Points (R, N, 3) at depths (R, N)."""
        return self.origin[:, None] + depth[..., None] * self.direction[:, None]


@dataclass(frozen=True)
class Altitude:
    """Two horizontal planes that hold the scene; ``axis`` is vertical, and ``down`` is the sign of its downward direction."""

    top: float
    ground: float
    axis: int = 0
    down: int = 1

    def bound(self, rays: Rays) -> Rays:
        """Near moves to the top plane for downward rays that start above it, far to the ground; far is never below near."""
        o, d = rays.origin[:, self.axis], rays.direction[:, self.axis]
        falls = d * self.down > 0
        to_top = torch.where(falls, (self.top - o) / d, torch.zeros_like(d))
        to_ground = torch.where(falls, (self.ground - o) / d, torch.full_like(d, torch.inf))
        near = torch.minimum(torch.maximum(rays.near, to_top), rays.far)
        far = torch.where(to_ground > 0, torch.minimum(rays.far, to_ground), rays.far)
        return Rays(rays.origin, rays.direction, near, torch.maximum(far, near), rays.image)


@dataclass(frozen=True)
class Ellipsoid:
    """The foreground: an axis-aligned ellipsoid."""

    centre: Tensor
    half: Tensor

    @classmethod
    def around(cls, positions: Tensor, altitude: Altitude | None = None, margin: float = 1.1) -> Ellipsoid:
        """Of the cameras' extent, scaled so that all of them (and their copies on both altitude planes) lie inside, times ``margin``."""
        points = positions
        if altitude is not None:
            copies = []
            for plane in (altitude.top, altitude.ground):
                copy = positions.clone()
                copy[:, altitude.axis] = plane
                copies.append(copy)
            points = torch.cat([positions, *copies])
        low, high = points.amin(0), points.amax(0)
        centre, half = (low + high) / 2, ((high - low) / 2).clamp(min=FLOOR)
        scale = ((points - centre) / half).norm(dim=-1).max()
        return cls(centre, half * scale * margin)

    def exit(self, rays: Rays) -> Tensor:
        """Depth (R,) at which rays leave; 0 for rays that miss it."""
        o, d = (rays.origin - self.centre) / self.half, rays.direction / self.half
        a, b, c = (d * d).sum(-1), (o * d).sum(-1), (o * o).sum(-1) - 1.0
        root = (b * b - a * c).clamp(min=0.0).sqrt()
        return ((root - b) / a).clamp(min=0.0)

    def unit(self, x: Tensor) -> Tensor:
        """Positions relative to centre and half-axes."""
        return (x - self.centre) / self.half


def stratified(near: Tensor, far: Tensor, count: int, jitter: bool) -> Tensor:
    """Edges (R, count + 1) that cut [near, far] evenly; with ``jitter`` inner edges move within their neighbours' mid-points."""
    steps = torch.linspace(0.0, 1.0, count + 1, device=near.device)
    edges = near[:, None] + (far - near)[:, None] * steps
    if jitter:
        middle = (edges[:, 1:] + edges[:, :-1]) / 2
        low, high = torch.cat([edges[:, :1], middle], -1), torch.cat([middle, edges[:, -1:]], -1)
        edges = low + (high - low) * torch.rand_like(edges)
    return edges


def inverse_cdf(edges: Tensor, weights: Tensor, count: int, jitter: bool) -> Tensor:
    """``count`` positions (R, count), sorted, distributed like ``weights`` (R, N) over the intervals of ``edges`` (R, N + 1)."""
    cdf = torch.nn.functional.pad(weights.cumsum(-1), (1, 0))
    cdf = cdf / cdf[:, -1:].clamp(min=FLOOR)
    rays = len(edges)
    if jitter:
        u = (torch.arange(count, device=edges.device) + torch.rand(rays, count, device=edges.device)) / count
    else:
        u = ((torch.arange(count, device=edges.device) + 0.5) / count).expand(rays, count).contiguous()
    right = torch.searchsorted(cdf.contiguous(), u, right=True).clamp(1, weights.shape[-1])
    left = right - 1
    low, high = cdf.gather(-1, left), cdf.gather(-1, right)
    share = ((u - low) / (high - low).clamp(min=FLOOR)).clamp(0.0, 1.0)
    start, stop = edges.gather(-1, left), edges.gather(-1, right)
    return start + share * (stop - start)


def compositing_weights(density: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (R, N) of samples front to back and the transmittance (R,) behind the last, from density and interval lengths (R, N)."""
    alpha = 1.0 - torch.exp(-density * delta)
    through = torch.cumprod(1.0 - alpha + FLOOR, dim=-1)
    before = torch.cat([torch.ones_like(through[:, :1]), through[:, :-1]], dim=-1)
    return before * alpha, through[:, -1]
