"""What the processes of the stress test do: train small networks through the runner's cache, as papers do."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.runner.cache import Cache
from shared.runner.context import RunContext
from shared.runner.pool import set_threads
from shared.training import fit

STEPS = 25


class Silent:
    """No bars."""

    def task(self, description: str, total: float | None = None) -> Any:
        import contextlib

        return contextlib.nullcontext(lambda done: None)


def train_one(*, seed: int, sleep_s: float, workdir: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """A small regression with a checkpoint at every step; the weights at the end, to the last bit."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def loss(step: int) -> torch.Tensor:
        time.sleep(sleep_s)
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(32, 8, generator=generator)
        return (model(x)[:, 0] - x.sin().sum(1)).square().mean()

    result = fit(
        model,
        optimizer,
        schedule,
        loss,
        steps=STEPS,
        seed=seed,
        workdir=workdir,
        progress=progress,
        checkpoint_every_s=0.0,
    )
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return {"weights": [value.hex() for value in weights.tolist()], "notes": list(result.notes)}


def train_all(cache: Path, seeds: Sequence[int], sleep_s: float, order: int | None) -> dict[int, Any]:
    """Every job through one shared cache folder, in an order of this process's own."""
    set_threads(1)
    seeds = list(seeds)
    if order is not None:
        random.Random(order).shuffle(seeds)
    context = RunContext(
        paper="m3vit", seed=0, seeds=tuple(seeds), scale="reduced", published={}, threads=1, workers=1, cache=Cache(cache), display=Silent()
    )  # fmt: skip
    jobs = [{"seed": seed, "sleep_s": sleep_s} for seed in seeds]
    return {job["seed"]: result for job, result, _ in context.map("train", train_one, jobs)}
