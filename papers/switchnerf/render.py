"""Rendering rays with either network: Switch-NeRF's coarse and fine passes, HMoHE's proposal rounds; images and camera paths.

Both renderers are modules that take :class:`~papers.switchnerf.rays.Rays` and return a :class:`Rendering`; training adds its losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from papers.switchnerf.encodings import to_unit_cube
from papers.switchnerf.hmohe import HMoHE, Proposal
from papers.switchnerf.losses import distortion_loss, interlevel_loss
from papers.switchnerf.rays import (
    FLOOR,
    Altitude,
    Camera,
    Ellipsoid,
    Rays,
    compositing_weights,
    inverse_cdf,
    stratified,
)
from papers.switchnerf.switch import NeRFMLP, SwitchNeRF

FAR = 1e10  # length of the last interval of a ray without background


@dataclass(frozen=True)
class Rendering:
    """Colours (R, 3), mean depth (R,), losses by name, and what the gate did (points in ray order)."""

    colour: Tensor
    depth: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    expert: Tensor | None = None  # (R, N)
    kept: Tensor | None = None  # (R, N) bool
    weights: Tensor | None = None  # (R, N)

    def dropped_weight(self) -> float:
        """Rendering weight lost to dropped points, per ray: what dropping costs an image, unlike the share of points."""
        if self.kept is None or self.weights is None:
            return 0.0
        return float((self.weights * ~self.kept).sum(-1).mean())


@dataclass(frozen=True)
class SwitchSampling:
    """Samples of the two passes; half as many for the background."""

    coarse: int = 256
    fine: int = 512


class SwitchRenderer(nn.Module):
    """One network serves both passes; coarse and fine samples are merged by depth and composited together, each evaluated once."""

    def __init__(
        self,
        network: SwitchNeRF | NeRFMLP,
        behind: NeRFMLP | None,
        region: Ellipsoid,
        sampling: SwitchSampling | None = None,
    ) -> None:
        super().__init__()
        self.network, self.behind, self.sampling = network, behind, sampling or SwitchSampling()
        self.register_buffer("centre", region.centre, persistent=False)
        self.register_buffer("half_size", region.half, persistent=False)
        self.centre: Tensor
        self.half_size: Tensor

    def forward(self, rays: Rays) -> Rendering:
        """Colour and depth of rays; the mean balance loss of the two passes."""
        region = Ellipsoid(self.centre, self.half_size)
        leaves = region.exit(rays)
        far = torch.maximum(torch.minimum(rays.far, leaves), rays.near) if self.behind is not None else rays.far
        edges = stratified(rays.near, far, self.sampling.coarse - 1, self.training)
        first = self._evaluate(rays, edges)
        with torch.no_grad():
            delta = edges.diff(dim=-1, append=far[:, None])
            weights, _ = compositing_weights(first[0], delta)
            middle = (edges[:, 1:] + edges[:, :-1]) / 2
            fine = inverse_cdf(middle, weights[:, 1:-1] + FLOOR, self.sampling.fine, self.training)
        second = self._evaluate(rays, fine)
        depth, order = torch.cat([edges, fine], -1).sort(dim=-1)
        density = torch.cat([first[0], second[0]], -1).gather(-1, order)
        colour = torch.cat([first[1], second[1]], 1).gather(1, order[..., None].expand(-1, -1, 3))
        last = depth[:, -1:] + FAR if self.behind is None else torch.maximum(far[:, None], depth[:, -1:])
        weights, through = compositing_weights(density, depth.diff(dim=-1, append=last))
        total = (weights[..., None] * colour).sum(1)
        if self.behind is not None:
            total = total + through[:, None] * self._behind(rays, region, leaves)
        return Rendering(total, (weights * depth).sum(-1), {"balance": (first[2] + second[2]) / 2}, weights=weights)

    def _evaluate(self, rays: Rays, depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = depth.shape[1]
        out = self.network(
            rays.at(depth).flatten(0, 1),
            rays.direction.repeat_interleave(count, 0),
            rays.image.repeat_interleave(count, 0),
        )
        return out.density.view(-1, count), out.colour.view(-1, count, 3), out.balance

    def _behind(self, rays: Rays, region: Ellipsoid, leaves: Tensor) -> Tensor:
        """Colour of the inverted sphere behind the foreground, for the rays that reach it."""
        assert self.behind is not None
        colour = torch.zeros_like(rays.origin)
        reached = (rays.far > leaves).nonzero()[:, 0]
        if len(reached) == 0:
            return colour
        some = rays.map(lambda t: t[reached])
        one, zero = torch.ones_like(some.near), torch.zeros_like(some.near)
        edges = stratified(zero, one, self.sampling.coarse // 2 - 1, self.training)  # inverse radius, 1 on the sphere
        first = self._shell(some, region, edges)
        with torch.no_grad():
            weights, _ = compositing_weights(first[0].flip(-1), self._gaps(edges.flip(-1)))
            middle = (edges[:, 1:] + edges[:, :-1]) / 2
            inner = weights.flip(-1)[:, 1:-1] + FLOOR
            fine = inverse_cdf(middle, inner, self.sampling.fine // 2, self.training)
        second = self._shell(some, region, fine)
        inverse, order = torch.cat([edges, fine], -1).sort(dim=-1, descending=True)  # from the sphere outwards
        density = torch.cat([first[0], second[0]], -1).gather(-1, order)
        shade = torch.cat([first[1], second[1]], 1).gather(1, order[..., None].expand(-1, -1, 3))
        weights, _ = compositing_weights(density, self._gaps(inverse))
        return colour.index_copy(0, reached, (weights[..., None] * shade).sum(1))

    @staticmethod
    def _gaps(inverse: Tensor) -> Tensor:
        """Interval lengths in inverse radius; the last one reaches infinity."""
        return torch.cat([inverse[:, :-1] - inverse[:, 1:], torch.full_like(inverse[:, :1], FAR)], dim=-1)

    def _shell(self, rays: Rays, region: Ellipsoid, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """Density and colour at inverse radii (R, N): input is the direction on the sphere and the inverse radius."""
        assert self.behind is not None
        o, d = region.unit(rays.origin), rays.direction / region.half
        a, b, c = (d * d).sum(-1, keepdim=True), (o * d).sum(-1, keepdim=True), (o * o).sum(-1, keepdim=True)
        radius = 1.0 / inverse.clamp(min=1e-6)
        t = (((b * b - a * (c - radius.square())).clamp(min=0.0)).sqrt() - b) / a
        point = (o[:, None] + t[..., None] * d[:, None]) / radius[..., None]
        count = inverse.shape[1]
        out = self.behind(
            torch.cat([point, inverse[..., None]], -1).flatten(0, 1),
            rays.direction.repeat_interleave(count, 0),
            rays.image.repeat_interleave(count, 0),
        )
        return out.density.view(-1, count), out.colour.view(-1, count, 3)


Spacing: TypeAlias = Literal["linear", "disparity"]


@dataclass(frozen=True)
class ProposalSampling:
    """Samples per proposal round and of the field; how they are spaced without knowledge."""

    rounds: tuple[int, ...] = (256, 96)
    samples: int = 48
    spacing: Spacing = (
        "disparity"  # linear up to depth 1, then in 1/depth; linear between near and far where planes bound the scene
    )
    unit: float = 1.0  # length that densities count in: a scene a few units deep is neither void nor opaque at first
    padding: float = 0.01
    anneal_steps: int = 1000
    anneal_slope: float = 10.0


def anneal_exponent(step: int, sampling: ProposalSampling) -> float:
    """Exponent on the proposal's weights: from 0 (uniform) to 1 over the first steps."""
    f = min(step / sampling.anneal_steps, 1.0)
    return sampling.anneal_slope * f / ((sampling.anneal_slope - 1) * f + 1)


class HMoHERenderer(nn.Module):
    """Proposal rounds, then the field; all of space is contracted into one grid around the box ``centre`` ± ``half``."""

    def __init__(
        self,
        network: HMoHE,
        proposals: Sequence[Proposal],
        centre: Tensor,
        half: Tensor,
        sampling: ProposalSampling | None = None,
    ) -> None:
        super().__init__()
        self.network, self.proposals = network, nn.ModuleList(proposals)
        self.sampling = sampling or ProposalSampling()
        if len(self.sampling.rounds) != len(proposals):
            raise ValueError("one number of samples per proposal net")
        self.register_buffer("centre", centre, persistent=False)
        self.register_buffer("half_size", half, persistent=False)
        self.centre: Tensor
        self.half_size: Tensor

    def cube(self, x: Tensor) -> Tensor:
        """World positions into [0, 1]^3."""
        return to_unit_cube((x - self.centre) / self.half_size)

    def forward(self, rays: Rays, step: int | None = None, update_proposals: bool = True) -> Rendering:
        """Colour and depth of rays. ``step`` anneals the proposals in training; None: full trust."""
        sampling, jitter = self.sampling, self.training
        exponent = 1.0 if step is None else anneal_exponent(step, sampling)
        low, high = self._spaced(rays.near), self._spaced(rays.far)
        zero, one = torch.zeros_like(low), torch.ones_like(low)
        count, rounds = sampling.rounds[0], []
        edges = stratified(zero, one, count, jitter)
        for index, proposal in enumerate(self.proposals):
            depth = self._depth(low, high, edges)
            with torch.set_grad_enabled(torch.is_grad_enabled() and update_proposals):
                x = self.cube(rays.at((depth[:, 1:] + depth[:, :-1]) / 2)).flatten(0, 1)
                weights, _ = compositing_weights(proposal(x).view(-1, count), depth.diff(dim=-1) / sampling.unit)
            rounds.append((edges, weights))
            count = (*sampling.rounds[1:], sampling.samples)[index]
            with torch.no_grad():
                mass = weights.pow(exponent) + sampling.padding
                edges = inverse_cdf(edges, mass, count + 1, jitter)
        depth = self._depth(low, high, edges)
        middle = (depth[:, 1:] + depth[:, :-1]) / 2
        out = self.network(
            self.cube(rays.at(middle)).flatten(0, 1),
            rays.direction.repeat_interleave(count, 0),
            rays.image.repeat_interleave(count, 0),
        )
        weights, through = compositing_weights(out.density.view(-1, count), depth.diff(dim=-1) / sampling.unit)
        # What is left behind the last sample takes its colour: there is no background net.
        weights = torch.cat([weights[:, :-1], weights[:, -1:] + through[:, None]], dim=-1)
        colour = (weights[..., None] * out.colour.view(-1, count, 3)).sum(1)
        losses = {"balance": out.balance}
        if self.training:
            losses["distortion"] = distortion_loss(edges, weights)
            if update_proposals:
                losses["interlevel"] = sum(
                    (interlevel_loss(edges, weights, e, w) for e, w in rounds), start=torch.zeros_like(out.balance)
                )
        shape = (-1, count)
        return Rendering(
            colour, (weights * middle).sum(-1), losses, out.expert.view(shape), out.kept.view(shape), weights.detach()
        )

    def _spaced(self, depth: Tensor) -> Tensor:
        if self.sampling.spacing == "linear":
            return depth
        return torch.where(depth < 1.0, depth / 2.0, 1.0 - 0.5 / depth.clamp(min=1.0))

    def _depth(self, low: Tensor, high: Tensor, s: Tensor) -> Tensor:
        """Depths of normalised positions s in [0, 1]."""
        value = low[:, None] + (high - low)[:, None] * s
        if self.sampling.spacing == "linear":
            return value
        return torch.where(value < 0.5, 2.0 * value, 0.5 / (1.0 - value).clamp(min=1e-6))


Renderer: TypeAlias = SwitchRenderer | HMoHERenderer


@torch.no_grad()
def render_image(
    renderer: Renderer,
    camera: Camera,
    near: float,
    far: float,
    *,
    image: int = 0,
    altitude: Altitude | None = None,
    batch: int = 2**15,
) -> tuple[Tensor, Tensor]:
    """Image (H, W, 3) in [0, 1] and depth (H, W) on the CPU. ``image``: whose appearance embedding is used."""
    was_training = renderer.training
    renderer.eval()
    rays = camera.rays(near, far, image).map(lambda t: t.to(renderer.centre.device))
    rays = rays if altitude is None else altitude.bound(rays)
    colours, depths = [], []
    for start in range(0, len(rays), batch):
        part = renderer(rays.map(lambda t, start=start: t[start : start + batch]))  # type: ignore[misc]
        colours.append(part.colour.clamp(0.0, 1.0).cpu())
        depths.append(part.depth.cpu())
    renderer.train(was_training)
    size = (camera.height, camera.width)
    return torch.cat(colours).view(*size, 3), torch.cat(depths).view(size)


def render_path(
    renderer: Renderer, cameras: Sequence[Camera], near: float, far: float, *, altitude: Altitude | None = None
) -> Iterator[Tensor]:
    """The images of a camera path, one by one."""
    for camera in cameras:
        yield render_image(renderer, camera, near, far, altitude=altitude)[0]


@torch.no_grad()
def expert_map(renderer: HMoHERenderer, height: float, size: int, low: Tensor, high: Tensor) -> Tensor:
    """Chosen expert (size, size) on the horizontal plane z = ``height`` between two corners (x, y): row = y, column = x."""
    line = torch.linspace(0.0, 1.0, size)
    y, x = torch.meshgrid(low[1] + (high[1] - low[1]) * line, low[0] + (high[0] - low[0]) * line, indexing="ij")
    points = torch.stack([x, y, torch.full_like(x, height)], -1).view(-1, 3).to(renderer.centre.device)
    return renderer.network.probabilities(renderer.cube(points)).argmax(-1).view(size, size).cpu()
