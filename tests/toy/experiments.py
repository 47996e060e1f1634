"""Experiments of the toy paper, quick and adjustable: they fail, sleep or count their calls when the config says so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.experiment import Artifact, Context, Measurement, Plot, Result, Table, experiment, seed_measurement


@experiment(claims=["speedup"], config=["method"])
def speed(cfg: Any, ctx: Context) -> Iterator[Result]:
    factor = cfg.method.factor if cfg.method.enabled else 1.0
    yield Measurement("speedup", ctx.published["baseline"] / (ctx.published["baseline"] / factor))
    yield Table("curve", "A curve", [{"n": n, "t": 1.0 / n} for n in (1, 2, 4)], Plot("line", "n", "t"))


@experiment(claims=["broken"], config=["fault"])
def fragile(cfg: Any, ctx: Context) -> Iterator[Result]:
    if cfg.fault.raises == "for the user":
        raise UserError("no images in 'here': give data.root=FOLDER")
    if cfg.fault.raises:
        raise ValueError("made to break")
    yield Measurement("broken", 1.0)


@experiment(claims=["accuracy"], config=["train"])
def training(cfg: Any, ctx: Context) -> Iterator[Result]:
    jobs = [{"seed": seed, **cfg.train} for seed in ctx.seeds]
    scores = {}
    for job, result, workdir in ctx.map("training", train_one, jobs):
        scores[job["seed"]] = result["score"]
        yield Artifact(f"seed{job['seed']}.txt", workdir / "model.txt")
    yield seed_measurement("accuracy", [scores[seed] for seed in ctx.seeds])


def train_one(
    *,
    seed: int,
    gain: float,
    steps: int,
    sleep_s: float,
    calls: str,
    workdir: Path,
    progress: Callable[[int, int], None],
) -> dict[str, float]:
    """Count to ``steps`` with a checkpoint after each, so that a killed run can show that it went on where it stopped."""
    checkpoint = workdir / "step.txt"
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    for step in range(start, steps):
        time.sleep(sleep_s)
        if calls:
            with open(calls, "a") as file:
                file.write(f"{seed} {step}\n")
        checkpoint.write_text(str(step + 1))
        progress(step + 1, steps)
    (workdir / "model.txt").write_text(f"{seed}")
    return {"score": gain * (1.0 + 0.1 * (seed % 3))}
