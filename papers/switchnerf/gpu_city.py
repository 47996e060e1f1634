"""Training on the large city within a time budget: config A, one grid, more or fewer experts, or Switch-NeRF, on the same images."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from papers.switchnerf import city as scene
from papers.switchnerf.counts import with_experts
from papers.switchnerf.hashgrid import GridSpec
from papers.switchnerf.losses import psnr, ssim
from papers.switchnerf.render import HMoHERenderer, ProposalSampling, Renderer, SwitchSampling, expert_map, render_image
from papers.switchnerf.train import exponential, optimiser, rendering_loss
from shared.errors import UserError
from shared.training import fit

if TYPE_CHECKING:
    from papers.switchnerf.gpu_bench import Bench

WARM_STEPS = 30  # that set the number of steps which fill the budget
TEST_SEED = 1000
HEIGHT, FLIGHT = (0.7, 1.0), 0.8  # of the cameras: every place is seen from some seventeen
VIEWS_PER_AREA = 25  # of 256 x 256 pixels, per unit square
SAMPLES = ((48, 24), 16)  # planes bound the depth, so fewer samples do than in open space
UNIT = 0.05  # densities count in it: the layer of buildings is three deep
# A lot is a 24th of a unit: proposals that tell lots apart, where nerfacto's grids see four voxels per unit of a city of 16 x 16 districts.
PROPOSALS = (GridSpec(6, 64, 1024, 19), GridSpec(6, 64, 2048, 19))


def arm_renderer(bench: Bench, arm: str) -> Renderer:
    """``hmohe`` (config A), ``experts<N>``, ``single`` (its largest grid alone) or ``switch``."""
    if arm == "switch":
        return bench.switch(sampling=SwitchSampling(16, 32) if bench.smoke else SwitchSampling(64, 64))
    plain = replace(bench.config, appearance=0)  # the city's light never changes
    largest = plain.experts[-1]
    configs = {
        "hmohe": plain,
        "single": replace(plain, experts=(largest,)),
        "homogeneous": replace(plain, experts=(largest,) * len(plain.experts)),
    }
    if arm.startswith("experts") and arm[7:].isdigit():
        configs[arm] = with_experts(plain, int(arm[7:]))
    if arm in configs:
        rounds, samples = ((16, 8), 8) if bench.smoke else SAMPLES
        sampling = ProposalSampling(rounds, samples, "linear", UNIT)
        # Voxels are cubes: walls span as many as their height asks for, not hundreds.
        return bench.hmohe(configs[arm], "auto", sampling, PROPOSALS, bench.city.extent / 2)
    raise UserError(f"unknown arm '{arm}': use hmohe, experts<N>, single, homogeneous or switch")


def train_city(bench: Bench, arm: str) -> dict[str, Any]:
    """Train, test on unseen views, and draw: PSNR and SSIM per image, by class of detail, share of experts, speed, peak memory."""
    bench = copy.copy(bench)
    bench.city = bench.large_city(bench.training.districts)
    built = bench.city.to(bench.device)
    views, pixels, tests = (4, 32, 2) if bench.smoke else (round(VIEWS_PER_AREA * bench.city.extent**2), 256, 12)
    train_views = [_moved(view, bench.device) for view in scene.cameras(bench.city, views, 10, pixels, height=HEIGHT)]
    started = time.monotonic()
    data = scene.image_set(built, train_views)
    cast_s = time.monotonic() - started
    renderer = arm_renderer(bench, arm).train()
    switch = not isinstance(renderer, HMoHERenderer)
    batch = 64 if bench.smoke else 4096 if switch else 16384
    generator = torch.Generator(bench.device).manual_seed(0)
    dropped: list[Tensor] = []

    def loss(step: int) -> Tensor:
        index = torch.randint(len(data.rays), (batch,), generator=generator, device=bench.device)
        rays = data.rays.map(lambda t: t[index])
        total, out = rendering_loss(renderer, rays, data.colour[index], step, None if bench.smoke else torch.bfloat16)
        if step % 50 == 0 and out.kept is not None:
            dropped.append(1.0 - out.kept.float().mean())
        return total

    if not bench.smoke:
        torch.cuda.reset_peak_memory_stats()
    warm = 2 if bench.smoke else WARM_STEPS
    adam = optimiser(renderer)
    times = []
    for _ in range(2):  # the first compiles kernels
        found = fit(renderer, adam, LambdaLR(adam, lambda step: 1.0), loss, steps=warm, seed=0)
        times.append(found.seconds / warm)
    steps = max(4, int(bench.training.budget_s / times[-1]))
    adam = optimiser(renderer)
    schedule = LambdaLR(adam, exponential(steps, 0.1 if switch else 0.01))
    result = fit(renderer, adam, schedule, loss, steps=steps, seed=0)
    report = {
        "districts": bench.city.districts**2, "views": views,
        "steps": steps, "batch_rays": batch, "seconds": result.seconds, "rays_per_s": steps * batch / result.seconds,
        "cast_s": cast_s, "train_rays": len(data.rays), "losses": list(result.losses[:: max(1, steps // 200)]),
        "parameters": sum(p.numel() for p in renderer.parameters()),
        "drop_rate": [float(d) for d in dropped[:: max(1, len(dropped) // 50)]],
        "peak_bytes": 0 if bench.smoke else torch.cuda.max_memory_allocated(),
        "data_bytes": 40 * len(data.rays) + 12 * len(data.rays),
    }  # fmt: skip
    return {**report, **_test(bench, arm, built, renderer, tests, pixels)}


def _moved(view: Any, device: str) -> Any:
    return replace(view, pose=view.pose.to(device))


def _test(bench: Bench, arm: str, built: Any, renderer: Renderer, tests: int, pixels: int) -> dict[str, Any]:
    scores, similar, errors, pixels_of = [], [], torch.zeros(4), torch.zeros(4)
    pictures: dict[str, Any] = {}
    batch = 512 if bench.smoke else 2**12 if not isinstance(renderer, HMoHERenderer) else 2**15
    for number, view in enumerate(scene.cameras(bench.city, tests, TEST_SEED, pixels, height=HEIGHT)):
        moved = _moved(view, bench.device)
        with bench.autocast():
            image, _ = render_image(renderer, moved, 0.0, 1e5, altitude=scene.ALTITUDE, batch=batch)
        rays = moved.rays(0.0, 1e5)
        truth, depth = (t.cpu() for t in scene.cast(built, rays.origin, rays.direction))
        scores.append(psnr(image.view(-1, 3), truth))
        similar.append(ssim(image, truth.view_as(image)))
        ground = rays.origin.cpu() + torch.where(torch.isfinite(depth), depth, 0.0)[:, None] * rays.direction.cpu()
        kind = bench.city.detail(ground[:, :2])
        errors.index_add_(0, kind, (image.view(-1, 3) - truth).square().mean(-1))
        pixels_of.index_add_(0, kind, torch.ones(len(truth)))
        if number < 3:
            pictures[f"image{number}"] = (255 * image).byte().numpy()
            pictures[f"truth{number}"] = (255 * truth.view_as(image)).byte().numpy()
    with bench.autocast():
        flight = [
            (
                255 * render_image(renderer, _moved(v, bench.device), 0.0, 1e5, altitude=scene.ALTITUDE, batch=batch)[0]
            ).byte()
            for v in scene.fly_over(bench.city, 2 if bench.smoke else 24, 16 if bench.smoke else 192, FLIGHT)
        ]
    pictures["flight"] = torch.stack(flight).numpy()
    found: dict[str, Any] = {
        "psnr": scores,
        "ssim": similar,
        "detail_psnr": (-10 * torch.log10(errors / pixels_of)).tolist(),
    }
    if isinstance(renderer, HMoHERenderer) and len(renderer.network.config.experts) > 1:
        chosen = expert_map(
            renderer, 0.03, 64 if bench.smoke else 384, torch.zeros(2), torch.full((2,), bench.city.extent)
        )
        pictures["experts"] = chosen.byte().numpy()
        found["expert_share"] = (
            torch.bincount(chosen.flatten(), minlength=len(renderer.network.config.experts)) / chosen.numel()
        ).tolist()
    np.savez_compressed(bench.out.with_name(f"city_{arm}.npz"), **pictures)
    return found
