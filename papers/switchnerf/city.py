"""A procedural city with exact ray casting: boxes on a lattice of lots, textured with the frequency of their district.

Districts of side 0.5 cycle through four classes of detail (2, 8, 24, 64 cycles per unit; heights .02 to .14), so that scene parts
want different resolutions. Two by two districts fill the unit square; ``districts=16`` with twelve lots each is the large scene. A ray
visits the lots that it crosses one by one and meets at most one box in each: exact, and independent of the number of boxes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from papers.switchnerf.rays import Altitude, Camera, Rays

SIDE = 0.5  # of a district
FREQUENCY = (2.0, 8.0, 24.0, 64.0)  # cycles per unit of each class
HEIGHT = (0.02, 0.06, 0.10, 0.14)
SKY, GROUND = (0.6, 0.75, 0.95), (0.45, 0.5, 0.4)
GROUND_PHASE, SUN = 0.3, (0.4, 0.25, 0.88)
TOP, BOTTOM = 0.15, -0.01  # planes that hold all surfaces
ALTITUDE = Altitude(TOP, BOTTOM, axis=2, down=-1)


@dataclass(frozen=True)
class City:
    """Boxes by lot: arrays of shape (n, n, …) for n lots along each axis; empty lots have height 0."""

    districts: int
    lots: int  # along a district
    low: Tensor  # (n, n, 2) corner of the box
    high: Tensor
    height: Tensor  # (n, n)
    colour: Tensor  # (n, n, 3)
    phase: Tensor  # (n, n, 2)

    @property
    def extent(self) -> float:
        """Side of the city."""
        return self.districts * SIDE

    @property
    def num_boxes(self) -> int:
        """Lots with a building."""
        return int((self.height > 0).sum())

    def to(self, device: str) -> City:
        """The city's tensors on a device."""
        moved = (t.to(device) for t in (self.low, self.high, self.height, self.colour, self.phase))
        return City(self.districts, self.lots, *moved)

    def detail(self, xy: Tensor) -> Tensor:
        """Class of detail 0 … 3 of positions (…, 2)."""
        index = (xy / SIDE).long().clamp(0, self.districts - 1)
        return 2 * (index[..., 0] % 2) + index[..., 1] % 2


def build_city(seed: int = 0, districts: int = 2, lots: int = 6) -> City:
    """Draw a city: districts and lots x outer, y inner; a vacant lot (15 %) draws nothing but its vacancy."""
    rng = np.random.default_rng(seed)
    n, cell = districts * lots, SIDE / lots
    low, high = np.zeros((n, n, 2)), np.zeros((n, n, 2))
    height, colour, phase = np.zeros((n, n)), np.zeros((n, n, 3)), np.zeros((n, n, 2))
    for dx in range(districts):
        for dy in range(districts):
            tallest = HEIGHT[2 * (dx % 2) + dy % 2]
            for i in range(dx * lots, (dx + 1) * lots):
                for j in range(dy * lots, (dy + 1) * lots):
                    if rng.random() < 0.15:
                        continue
                    margin = rng.uniform(0.12, 0.30, 2) * cell
                    corner = np.array([i, j]) * cell
                    low[i, j], high[i, j] = corner + margin, corner + cell - margin
                    height[i, j] = tallest * rng.uniform(0.4, 1.0)
                    colour[i, j] = rng.uniform(0.25, 0.9, 3)
                    phase[i, j] = rng.uniform(0.0, 2 * math.pi, 2)
    arrays = (torch.from_numpy(a).float() for a in (low, high, height, colour, phase))
    return City(districts, lots, *arrays)


def shade(city: City, point: Tensor, normal: Tensor, base: Tensor, phase: Tensor, ground: Tensor) -> Tensor:
    """Colour (R, 3) of surface points; the ground has half of its district's frequency."""
    frequency = torch.tensor(FREQUENCY, device=point.device)[city.detail(point[:, :2])]
    w = 2 * math.pi * torch.where(ground, frequency / 2, frequency)
    x, y, z = point.unbind(-1)
    u = torch.where(normal[:, 0].abs() > 0.5, y, x)
    v = torch.where(normal[:, 2].abs() > 0.5, y, z)
    p1, p2 = phase.unbind(-1)
    s = 0.5 + 0.25 * torch.sin(w * u + p1) * torch.sin(w * v + p2)
    s = s + 0.25 * torch.sin(0.5 * w * u + 2 * p2) * torch.cos(0.37 * w * v)
    sun = torch.nn.functional.normalize(torch.tensor(SUN, device=point.device), dim=0)
    light = 0.35 + 0.65 * (normal @ sun).clamp(min=0.0)
    return base * (s * light)[:, None]


def cast(city: City, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Colour (R, 3) and depth (R,) of the first surface; the sky has infinite depth."""
    device = origin.device
    n, cell = city.districts * city.lots, SIDE / city.lots
    rays = len(origin)
    safe = torch.where(direction.abs() < 1e-12, torch.full_like(direction, 1e-12), direction)
    inverse = 1.0 / safe
    # Depths between which the ray is below the tallest box and above the square of lots.
    limits = torch.tensor([city.extent, city.extent, float(city.height.max())], device=device)
    a, b = -origin * inverse, (limits - origin) * inverse
    enter = torch.minimum(a, b).amax(-1).clamp(min=0.0)
    leave = torch.maximum(a, b).amin(-1)
    depth = torch.full((rays,), torch.inf, device=device)
    box = torch.zeros(rays, dtype=torch.int64, device=device)
    face = torch.zeros(rays, dtype=torch.int64, device=device)
    active = (enter < leave).nonzero()[:, 0]
    o, d, inv = origin[active], direction[active], inverse[active]
    t, end = enter[active], leave[active]
    lot = ((o + t[:, None] * d)[:, :2] / cell).floor().long().clamp(0, n - 1)
    step = torch.where(d[:, :2] >= 0, 1, -1)
    heights, lows, highs = city.height.flatten(), city.low.flatten(0, 1), city.high.flatten(0, 1)
    while len(active):
        flat = lot[:, 0] * n + lot[:, 1]
        tall = heights[flat]
        corner = torch.cat([lows[flat], torch.zeros_like(tall)[:, None]], -1)
        other = torch.cat([highs[flat], tall[:, None]], -1)
        first, second = (corner - o) * inv, (other - o) * inv
        near, axis = torch.minimum(first, second).max(-1)
        far = torch.maximum(first, second).amin(-1)
        hit = (tall > 0) & (near < far) & (near > 0)
        depth[active[hit]], box[active[hit]], face[active[hit]] = near[hit], flat[hit], axis[hit]
        wall = ((lot + (step > 0)) * cell - o[:, :2]) * inv[:, :2]
        which = (wall[:, 1] < wall[:, 0]).long()
        t = wall.gather(-1, which[:, None])[:, 0]
        lot = lot.scatter_add(-1, which[:, None], step.gather(-1, which[:, None]))
        go = ~hit & (t < end) & (lot >= 0).all(-1) & (lot < n).all(-1)
        active, o, d, inv, end, lot, step = (v[go] for v in (active, o, d, inv, end, lot, step))
    ground = -origin[:, 2] * inverse[:, 2]
    on_ground = (ground > 0) & (ground < depth)
    depth = torch.where(on_ground, ground, depth)
    visible = torch.isfinite(depth)
    point = origin + torch.where(visible, depth, 0.0)[:, None] * direction
    up = torch.tensor([0.0, 0.0, 1.0], device=device)
    normal = torch.nn.functional.one_hot(face, 3) * -direction.sign()
    normal = torch.where(on_ground[:, None], up, normal)
    base = torch.where(on_ground[:, None], torch.tensor(GROUND, device=device), city.colour.flatten(0, 1)[box])
    phase = torch.where(on_ground[:, None], GROUND_PHASE, city.phase.flatten(0, 1)[box])
    colour = shade(city, point, normal, base, phase, on_ground)
    return torch.where(visible[:, None], colour, torch.tensor(SKY, device=device)), depth


def look(x: Tensor, y: Tensor, z: Tensor, yaw: Tensor, pitch: Tensor) -> Tensor:
    """Poses (N, 3, 4) of cameras that look ``pitch`` below the horizon along ``yaw``; columns right, up, back, centre."""
    forward = torch.stack([pitch.cos() * yaw.cos(), pitch.cos() * yaw.sin(), -pitch.sin()], -1)
    right = torch.stack([yaw.sin(), -yaw.cos(), torch.zeros_like(yaw)], -1)
    up = torch.linalg.cross(right, forward)
    return torch.stack([right, up, -forward, torch.stack([x, y, z], -1)], -1)


def cameras(
    city: City,
    count: int,
    seed: int,
    pixels: int,
    field_of_view: float = 50.0,
    height: tuple[float, float] = (0.35, 0.5),
) -> list[Camera]:
    """Cameras on a jittered lattice over the city, z in U(height), pitch in U(50°, 90°), any yaw; square images."""
    rng = np.random.default_rng(seed)
    columns = math.ceil(math.sqrt(count))
    places = [(i, j) for i in range(columns) for j in range(columns)]
    chosen = rng.permutation(len(places))[:count]
    jitter = rng.random((count, 2))
    xy = (np.array([places[k] for k in chosen]) + jitter) / columns * city.extent
    z, yaw = rng.uniform(*height, count), rng.uniform(0.0, 2 * math.pi, count)
    pitch = np.radians(rng.uniform(50.0, 90.0, count))
    poses = look(*(torch.from_numpy(v).float() for v in (xy[:, 0], xy[:, 1], z, yaw, pitch)))
    focal = pixels / 2 / math.tan(math.radians(field_of_view) / 2)
    return [Camera(pixels, pixels, focal, focal, pixels / 2, pixels / 2, pose) for pose in poses]


def fly_over(city: City, frames: int, pixels: int, height: float = 0.45) -> list[Camera]:
    """A diagonal flight over the city, looking 55° down and slowly turning."""
    s = torch.linspace(0.15, 0.85, frames) * city.extent
    yaw = torch.linspace(math.pi / 4, 3 * math.pi / 4, frames)
    poses = look(s, s, torch.full_like(s, height), yaw, torch.full_like(s, math.radians(55.0)))
    focal = pixels / 2 / math.tan(math.radians(25.0))
    return [Camera(pixels, pixels, focal, focal, pixels / 2, pixels / 2, pose) for pose in poses]


def surface_samples(city: City, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tier 0: hit points (n, 3), directions and colours of rays that meet the city's square; x, y in U(0, extent), pitch in U(40°, 90°)."""
    rng = np.random.default_rng(seed)
    u = torch.from_numpy(rng.random((count, 5))).float()
    yaw, pitch = 2 * math.pi * u[:, 3], torch.deg2rad(40.0 + 50.0 * u[:, 4])
    direction = torch.stack([pitch.cos() * yaw.cos(), pitch.cos() * yaw.sin(), -pitch.sin()], -1)
    origin = torch.cat([u[:, :2] * city.extent, 0.35 + 0.15 * u[:, 2:3]], -1)
    colour, depth = cast(city, origin, direction)
    point = origin + depth[:, None] * direction
    inside = ((point[:, :2] >= 0) & (point[:, :2] <= city.extent)).all(-1) & torch.isfinite(depth)
    return point[inside], direction[inside], colour[inside]


@dataclass(frozen=True)
class ImageSet:
    """Rays of many images with their true colours (R, 3), bounded by the city's altitude planes."""

    rays: Rays
    colour: Tensor
    cameras: tuple[Camera, ...]


def _digest(city: City, views: list[Camera]) -> str:
    digest = hashlib.sha256()
    for tensor in (*(getattr(city, f.name) for f in fields(city)), *(view.pose for view in views)):
        digest.update(np.asarray(tensor).tobytes())
    return f"{digest.hexdigest()[:16]}-{views[0].width}"


def image_set(city: City, views: list[Camera], folder: Path | None = None) -> ImageSet:
    """Cast all pixels of ``views``; colours are kept in ``folder`` by the content of city and cameras."""
    parts = [ALTITUDE.bound(view.rays(0.0, 10.0 * city.extent, image)) for image, view in enumerate(views)]
    rays = Rays(*(torch.cat([getattr(part, name) for part in parts]) for name in Rays.__dataclass_fields__))
    path = None if folder is None else folder / f"city-{_digest(city, views)}.pt"
    if path is not None and path.exists():
        return ImageSet(rays, torch.load(path, weights_only=True), tuple(views))
    parts_of = zip(rays.origin.split(2**20), rays.direction.split(2**20), strict=True)
    colour = torch.cat([cast(city, origin, direction)[0] for origin, direction in parts_of])
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(colour, path)
    return ImageSet(rays, colour, tuple(views))
