"""Training either renderer on rays with known colours: losses, Adam, exponential decay; seeded, resumable, with checkpoints.

::

    renderer = HMoHERenderer(HMoHE(CONFIG_A), [Proposal(grid) for grid in PROPOSALS], centre, half)
    train_renderer(renderer, lambda step: (rays, colour), steps=100_000, workdir=Path("run"))
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from papers.switchnerf.rays import Rays
from papers.switchnerf.render import HMoHERenderer, Renderer, Rendering
from shared.training import FitResult, fit

BALANCE_WEIGHT = 5e-4  # Switch-NeRF's public code
DISTORTION_WEIGHT = 0.002  # nerfacto
PROPOSALS_SETTLED, PROPOSALS_EVERY = 5000, 5  # steps after which proposals are updated now and then
LR = {"hmohe": 1e-2, "switch": 5e-4}
LR_END = {"hmohe": 0.01, "switch": 0.1}  # of the initial rate, reached exponentially

Batch: TypeAlias = Callable[[int], tuple[Rays, Tensor]]


def exponential(steps: int, end: float = 0.1) -> Callable[[int], float]:
    """Factor on the learning rate: 1 at the start, ``end`` after ``steps``."""
    return lambda step: float(end ** (step / max(steps, 1)))


def rendering_loss(
    renderer: Renderer, rays: Rays, target: Tensor, step: int, autocast: torch.dtype | None = None
) -> tuple[Tensor, Rendering]:
    """Squared error and the renderer's own losses, weighted; what was rendered.

    Switch-NeRF: MSE + 5e-4 balance. HMoHE adds 1.0 interlevel (in steps that update the proposals) and 0.002 distortion.
    """
    device = target.device.type
    with torch.autocast(device, autocast) if autocast else nullcontext():
        if isinstance(renderer, HMoHERenderer):
            update = step < PROPOSALS_SETTLED or step % PROPOSALS_EVERY == 0
            out = renderer(rays, step, update_proposals=update)
        else:
            out = renderer(rays)
    loss = F.mse_loss(out.colour.float(), target) + BALANCE_WEIGHT * out.losses["balance"]
    if "distortion" in out.losses:
        loss = loss + DISTORTION_WEIGHT * out.losses["distortion"]
    if "interlevel" in out.losses:
        loss = loss + out.losses["interlevel"]
    return loss, out


def optimiser(renderer: Renderer, lr: float | None = None) -> torch.optim.Adam:
    """Adam with the network's own rate and epsilon; fused on a GPU."""
    kind = "hmohe" if isinstance(renderer, HMoHERenderer) else "switch"
    eps = 1e-15 if kind == "hmohe" else 1e-8
    return torch.optim.Adam(renderer.parameters(), lr=lr or LR[kind], eps=eps, fused=renderer.centre.is_cuda)


def train_renderer(
    renderer: Renderer,
    batch: Batch,
    *,
    steps: int,
    lr: float | None = None,
    lr_end: float | None = None,
    seed: int = 0,
    workdir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, Rendering], None] | None = None,
) -> FitResult:
    """Take ``steps`` steps on ``batch(step)`` = (rays, colours (R, 3)); weights stay in ``renderer``, checkpoints go to ``workdir``.

    Args:
        batch: must depend on the step alone, so that a killed run resumes to the same weights.
        lr, lr_end: initial rate and its final share; the network's own by default.
        autocast: type of the products on a GPU (``torch.bfloat16``).
        on_step: sees what each step rendered.

    Raises:
        UserError: the loss is not finite.
    """
    adam = optimiser(renderer, lr)
    end = lr_end or LR_END["hmohe" if isinstance(renderer, HMoHERenderer) else "switch"]

    def loss(step: int) -> Tensor:
        rays, target = batch(step)
        value, out = rendering_loss(renderer, rays, target, step, autocast)
        if on_step is not None:
            on_step(step, out)
        return value

    schedule = LambdaLR(adam, exponential(steps, end))
    return fit(renderer, adam, schedule, loss, steps=steps, seed=seed, workdir=workdir, progress=progress)
