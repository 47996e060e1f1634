"""Training jobs of the reduced scale: the surface field (tier 0) and full rendering (tier 1) on the procedural city.

Batches depend on seed and step alone, so that a killed job resumes to the same bits. A tenth of the training rays is held back for choosing
learning rates; test rays decide nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from papers.switchnerf import city as scene
from papers.switchnerf.arms import arm as arm_of
from papers.switchnerf.hashgrid import GridSpec
from papers.switchnerf.hmohe import Proposal
from papers.switchnerf.losses import psnr
from papers.switchnerf.rays import Rays
from papers.switchnerf.render import HMoHERenderer, ProposalSampling, render_image
from papers.switchnerf.train import BALANCE_WEIGHT, exponential, train_renderer
from shared.training import fit

LR_DECAY = 0.1  # over a run, exponentially
CHECKPOINT = "renderer.pt"
PROPOSAL_S = GridSpec(4, 8, 64, 12)
CENTRE, HALF = (0.5, 0.5, 0.05), (0.5, 0.5, 0.5)  # of the small city's box, a cube so that voxels are
UNIT = 0.02  # densities count in it, of all fields and proposals: opaque within a few hundredths of the unit square

Progress = Callable[[int, int], None]


class StepLog(nn.Module):
    """One number per step and the CPU seconds up to the next, as buffers: they resume with the checkpoint of the module that holds them."""

    value: Tensor
    cpu_s: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(steps))
        self.register_buffer("cpu_s", torch.zeros(steps))
        self._last = (-1, time.process_time())

    def note(self, step: int, value: float) -> None:
        """Note a step's number; the time since the previous step is that step's."""
        now, (before, started) = time.process_time(), self._last
        if 0 <= before < step:
            self.cpu_s[before] = now - started
        self.value[step] = value
        self._last = (step, now)

    def ends(self, count: int = 10) -> list[float]:
        """Means of the first and the last ``count`` steps."""
        return [float(self.value[:count].mean()), float(self.value[-count:].mean())]


def batch_index(count: int, size: int, seed: int, step: int) -> Tensor:
    """Indices (size,) of one batch, drawn from seed and step alone."""
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))


@cache
def _surface(seed: int, train_rays: int, test_rays: int) -> tuple[tuple[Tensor, ...], ...]:
    """Training, validation and test rays of one city: points, directions, colours."""
    built = scene.build_city(seed)
    train = scene.surface_samples(built, train_rays, 2 * seed + 1)
    test = scene.surface_samples(built, test_rays, 2 * seed + 2)
    cut = len(train[0]) * 9 // 10
    return tuple(t[:cut] for t in train), tuple(t[cut:] for t in train), test


def fit_surface(
    *,
    seed: int,
    arm: str,
    steps: int,
    batch: int,
    lr: float,
    train_rays: int,
    test_rays: int,
    progress: Progress,
    workdir: Path,
) -> dict[str, Any]:
    """Tier 0: regress the colour of surface points. PSNR on validation and test rays, the gate's behaviour, and CPU seconds."""
    chosen = arm_of(arm)
    train, validation, test = _surface(seed, train_rays, test_rays)
    torch.manual_seed(seed)
    field = chosen.build()
    optimizer = torch.optim.Adam(field.parameters(), lr=lr, eps=1e-15)
    field.add_module("log", log := StepLog(steps))

    def loss(step: int) -> Tensor:
        x, d, target = (t[batch_index(len(train[0]), batch, seed, step)] for t in train)
        out = field(x, d, expert=_district(x, chosen.router))
        log.note(step, 1.0 - float(out.kept.float().mean()))
        return F.mse_loss(out.colour, target) + BALANCE_WEIGHT * out.balance

    fit(
        field, optimizer, LambdaLR(optimizer, exponential(steps, LR_DECAY)), loss,
        steps=steps, seed=seed, workdir=workdir, progress=progress,
    )  # fmt: skip
    field.eval()
    colour, expert = _evaluate(field, test[0], test[1], chosen.router)
    share = torch.bincount(expert, minlength=int(expert.max()) + 1).double() / len(expert)
    district = scene.build_city(seed).detail(test[0][:, :2])
    return {
        "psnr": psnr(colour, test[2]),
        "validation_psnr": psnr(_evaluate(field, validation[0], validation[1], chosen.router)[0], validation[2]),
        "district_psnr": [psnr(colour[district == k], test[2][district == k]) for k in range(4)],
        "expert_share": share.tolist(),
        "drop_rate": log.ends(),
        "cpu_s": float(log.cpu_s.sum()),
    }


def _district(x: Tensor, router: str) -> Tensor | None:
    return None if router == "learned" else 2 * (x[:, 0] >= 0.5).long() + (x[:, 1] >= 0.5).long()


@torch.no_grad()
def _evaluate(field: nn.Module, x: Tensor, d: Tensor, router: str) -> tuple[Tensor, Tensor]:
    colours, experts = [], []
    for part in range(0, len(x), 8192):
        some = slice(part, part + 8192)
        out = field(x[some], d[some], expert=_district(x[some], router))
        colours.append(out.colour)
        experts.append(out.expert)
    return torch.cat(colours), torch.cat(experts)


def renderer_of(arm: str, sampling: ProposalSampling) -> HMoHERenderer:
    """Tier 1's renderer of an arm: one proposal net and the field, the same sampler for all arms."""
    field = arm_of(arm).build()
    return HMoHERenderer(
        field, [Proposal(PROPOSAL_S)], torch.tensor(CENTRE), torch.tensor(HALF), sampling  # type: ignore[arg-type]
    )  # fmt: skip


def sampling_of(proposal_samples: int, samples: int) -> ProposalSampling:
    """Tier 1's sampler: one proposal round, linear between the altitude planes."""
    return ProposalSampling((proposal_samples,), samples, spacing="linear", unit=UNIT, anneal_steps=200)


def fit_images(
    *, seed: int, arm: str, steps: int, batch: int, lr: float, views: int, test_views: int, pixels: int, proposal_samples: int,
    samples: int, progress: Progress, workdir: Path,
) -> dict[str, Any]:  # fmt: skip
    """Tier 1: train a renderer on images of the city. PSNR per test image and district; leaves ``renderer.pt`` in ``workdir``."""
    built = scene.build_city(seed)
    train = scene.image_set(built, scene.cameras(built, views, 10 + seed, pixels), workdir.parent / "images")
    torch.manual_seed(seed)
    renderer = renderer_of(arm, sampling_of(proposal_samples, samples))
    renderer.add_module("log", log := StepLog(steps))

    def draw(step: int) -> tuple[Rays, Tensor]:
        index = batch_index(len(train.rays), batch, seed, step)
        return train.rays.map(lambda t: t[index]), train.colour[index]

    train_renderer(
        renderer, draw, steps=steps, lr=lr, lr_end=LR_DECAY, seed=seed, workdir=workdir, progress=progress,
        on_step=lambda step, out: log.note(step, out.dropped_weight()),
    )  # fmt: skip
    del renderer.log
    torch.save(renderer.state_dict(), workdir / CHECKPOINT)
    scores, by_class, pixels_by_class = [], torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for camera in scene.cameras(built, test_views, 1000 + seed, pixels):
        image, _ = render_image(renderer, camera, 0.0, 10.0, altitude=scene.ALTITUDE, batch=4096)
        rays = camera.rays(0.0, 10.0)
        truth, depth = scene.cast(built, rays.origin, rays.direction)
        scores.append(psnr(image.view(-1, 3), truth))
        ground = rays.origin + torch.where(torch.isfinite(depth), depth, 0.0)[:, None] * rays.direction
        error = (image.view(-1, 3).double() - truth).square().mean(-1)
        by_class.index_add_(0, built.detail(ground[:, :2]), error)
        pixels_by_class.index_add_(0, built.detail(ground[:, :2]), torch.ones_like(error))
    per_class = [
        -10.0 * float(torch.log10(e / n)) if n else None for e, n in zip(by_class, pixels_by_class, strict=True)
    ]
    return {
        "psnr": sum(scores) / len(scores), "district_psnr": per_class, "cpu_s": float(log.cpu_s.sum()),
        "dropped_weight": log.ends(),
    }  # fmt: skip
