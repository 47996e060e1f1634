"""What the learnt experiments of EAR share: one world per seed, results in the order of the seeds, means with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.experiment import Context

SECTIONS = ["world", "data", "detector"]


def plain(section: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(section) if OmegaConf.is_config(section) else dict(section)


def world_settings(cfg: Any) -> dict[str, Any]:
    """Settings of the world with ``auto`` resolved: the reference run on MNIST where a data folder is given, else drawn digits."""
    world = plain(cfg.world)
    if world["source"] == "auto":
        world["source"] = "mnist" if cfg.data.root else "glyphs"
    if world["side"] == "auto":
        world["side"] = 28 if world["source"] == "mnist" else 20
    world["root"] = str(cfg.data.root) if world["source"] == "mnist" and cfg.data.root else None
    return world


def worlds_of(cfg: Any, ctx: Context) -> dict[int, tuple[str, Any]]:
    """Key and folder of each seed's world."""
    from papers.ear.jobs import world_job
    from papers.ear.world import WorldSettings

    settings = world_settings(cfg)
    WorldSettings(**settings)  # refuses bad input before anything is computed
    jobs = [{"seed": seed, "settings": settings} for seed in ctx.seeds]
    return {job["seed"]: (result["world"], workdir) for job, result, workdir in ctx.map("worlds", world_job, jobs)}


def by_seed(ctx: Context, name: str, function: Any, jobs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Results in the order of the seeds."""
    found = {job["seed"]: result for job, result, _ in ctx.map(name, function, jobs)}
    return [found[seed] for seed in ctx.seeds]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
